"""A host that attends to few keys is causal, the same with a cache, and itself where all fit."""

from __future__ import annotations

import functools

import pytest
import torch
from hosts import logits, tiny_host
from integration.sparse_cases import (
    BUDGET,
    HOSTS,
    LAWS,
    SINGLE,
    WIDE,
    continued,
    edited,
    gravity_host,
    inputs_of,
    left_padded,
    sparse_host,
)

from gravity_hf import KeyBudget, densify_attention, sparsify_attention, sparsity, unpatch_gravity
from gravity_hf.integration.sparse_settings import sparse_modules

sparse = functools.cache(sparse_host)
SOME = ["qwen2", "gpt2", "queries scaled beforehand", "lifted"]


def dense_host(name: str):
    return gravity_host(name) if name in LAWS else tiny_host(name)


@pytest.mark.parametrize("name", [*HOSTS, *LAWS])
def test_where_the_budget_covers_all_keys_the_logits_are_the_hosts_to_the_last_bit(name):
    model = dense_host(name)
    for inputs in (inputs_of(), left_padded()):
        before = logits(model, inputs)
        sparsify_attention(model, WIDE)
        assert torch.equal(logits(model, inputs), before)
        densify_attention(model)


@pytest.mark.parametrize("name", [*HOSTS, *LAWS])
def test_a_later_token_changes_no_earlier_output(name):
    model, inputs = sparse(name), inputs_of()
    before = logits(model, inputs)
    for position in (6, 17, 39):
        after = logits(model, edited(inputs, position))
        assert torch.equal(after[:, :position], before[:, :position])
        assert not torch.equal(after[:, position:], before[:, position:])


@pytest.mark.parametrize("name", [*HOSTS, *LAWS])
def test_a_small_budget_leaves_keys_out(name):
    model, inputs = sparse(name), inputs_of()
    few = logits(model, inputs)
    with sparsity(model, attention="dense"):
        everything = logits(model, inputs)
    assert (few - everything).abs().max() > 1e-2
    # Rows with no more keys than the budget has see all of them.
    torch.testing.assert_close(few[:, :8], everything[:, :8], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("budget", [BUDGET, SINGLE], ids=["blocks", "keys"])
@pytest.mark.parametrize("name", [*SOME, "force", "power"])
def test_the_text_is_the_same_with_a_cache(name, budget):
    model, inputs = sparse(name, budget), left_padded()
    expected = continued(model, inputs, use_cache=False)
    for cache in ("dynamic", "static"):
        assert torch.equal(continued(model, inputs, cache_implementation=cache), expected)


@pytest.mark.parametrize("name", SOME)
def test_beams_are_the_same_with_a_cache(name):
    model, inputs = sparse(name), inputs_of()
    without = continued(model, inputs, num_beams=3, use_cache=False)
    assert torch.equal(continued(model, inputs, num_beams=3), without)


@pytest.mark.parametrize("budget", [BUDGET, SINGLE], ids=["blocks", "keys"])
@pytest.mark.parametrize("name", SOME)
def test_a_left_padded_row_is_the_row_alone(name, budget):
    model, inputs = sparse(name, budget), left_padded(by=7)
    alone = {key: x[1:, 7:] for key, x in inputs.items()}
    if name == "gpt2":  # which counts positions from the padding on
        inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    torch.testing.assert_close(
        logits(model, inputs)[1:, 7:], logits(model, alone), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", SOME)
def test_densify_gives_the_host_back(name):
    model, inputs = dense_host(name), inputs_of()
    before, state, config = logits(model, inputs), model.state_dict(), model.config.to_dict()
    sparsify_attention(model, BUDGET, screening="learned", screen_dim=4)
    assert set(model.state_dict()) > set(state)
    densify_attention(model)
    assert torch.equal(logits(model, inputs), before)
    assert set(model.state_dict()) == set(state) and model.config.to_dict() == config
    assert not sparse_modules(model)


def test_gravity_and_budget_can_be_taken_back_in_either_order():
    inputs, expected = inputs_of(), logits(tiny_host("qwen2"), inputs_of())
    for steps in ((densify_attention, unpatch_gravity), (unpatch_gravity, densify_attention)):
        model = sparse_host("power")
        for step in steps:
            step(model)
        assert torch.equal(logits(model, inputs), expected)
        assert model.config._attn_implementation == "sdpa"


def test_layers_with_a_sliding_window_stay_as_they_are():
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    window = {"layer_types": kinds, "sliding_window": 5, "use_sliding_window": True}
    model, inputs = tiny_host("qwen2", **window), inputs_of()
    sparsify_attention(model, BUDGET)
    assert list(sparse_modules(model)) == ["model.layers.1.self_attn"]
    before = logits(model, inputs)
    assert torch.equal(logits(model, edited(inputs, 20))[:, :20], before[:, :20])
    without = continued(model, inputs, use_cache=False)
    assert torch.equal(continued(model, inputs), without)
    model.model.layers[1].self_attn.attention_policy = "dense"
    changed = logits(model, inputs)
    densify_attention(model)
    assert torch.equal(changed, logits(model, inputs)) and not torch.equal(changed, before)


def test_packed_texts_do_not_see_each_other():
    model, ids = sparse("qwen2", SINGLE), inputs_of(batch=1)["input_ids"]
    positions = torch.cat([torch.arange(23), torch.arange(17)])[None]
    packed = logits(model, {"input_ids": ids, "position_ids": positions}, use_cache=False)
    alone = [logits(model, {"input_ids": part}) for part in ids.split([23, 17], 1)]
    torch.testing.assert_close(packed, torch.cat(alone, 1), rtol=1e-4, atol=1e-4)


REFUSED = {
    "cross attention": "encoder",
    "bert": "3 modules that are not",
    "vit": "3 modules that are not",
    "mistral": "sliding window",
    "a cap on the scores": "caps its scores",
    "attention sinks": "sinks",
    "keys chosen by an indexer": "indexer of its own",
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_sparse_is_refused_before_anything_is_changed(name):
    model = tiny_host(name)
    before = model.config.to_dict(), model.config._attn_implementation
    with pytest.raises((TypeError, ValueError), match=REFUSED[name]):
        sparsify_attention(model, BUDGET)
    assert (model.config.to_dict(), model.config._attn_implementation) == before


def test_calling_it_twice_is_defined():
    model = sparse_host("qwen2")
    assert sparsify_attention(model, BUDGET) is model
    with pytest.raises(RuntimeError, match="densify_attention"):
        sparsify_attention(model, SINGLE)
    with pytest.raises(RuntimeError, match="expected a model made sparse"):
        densify_attention(densify_attention(model))


def test_a_misspelt_setting_is_an_error():
    model = tiny_host("llama")
    with pytest.raises(ValueError, match="top_keys"):
        sparsify_attention(model, {"top_keys": 8})
    with pytest.raises(ValueError, match="screening: expected one of"):
        sparsify_attention(model, BUDGET, screening="magic")
    with pytest.raises(ValueError, match="calibration"):
        sparsify_attention(model, BUDGET, screening="principal")


def test_what_only_dense_attention_computes_is_refused_in_a_call():
    model, inputs = sparse("qwen2"), inputs_of()
    with pytest.raises(ValueError, match="output_attentions"):
        logits(model, inputs, output_attentions=True)
    with sparsity(model, attention="dense"):
        assert model(**inputs, output_attentions=True).attentions


def test_it_is_an_attention_implementation_like_any_other():
    model, inputs = tiny_host("llama"), inputs_of()
    model.config.sparse_attention = {"top_k": 8, "block_size": 2, "window": 3, "sinks": 1}
    model.set_attn_implementation("sparse_topk")
    assert torch.equal(logits(model, inputs), logits(sparse("llama"), inputs))
    del model.config.sparse_attention
    model.set_attn_implementation("sdpa")
    dense = logits(model, inputs)
    model.set_attn_implementation("sparse_topk")
    assert torch.equal(logits(model, inputs), dense)  # the defaults cover 40 tokens


def test_gradients_reach_every_weight_and_follow_the_chosen_keys():
    model, inputs = sparse_host("qwen2"), inputs_of()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_masses_learn_under_a_budget():
    model, inputs = sparse_host("power"), inputs_of()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    masses = [p for name, p in model.named_parameters() if name.endswith("mass_log")]
    assert len(masses) == 3 and all(p.grad.abs().sum() > 0 for p in masses)


def test_gravity_may_not_be_swapped_for_dot_products_meanwhile():
    model = sparse_host("power")
    model.config._attn_implementation_internal = "sdpa"
    with pytest.raises(ValueError, match="dot-product attention on weights made for gravity"):
        logits(model, inputs_of())


def test_without_a_budget_it_is_the_default_one():
    model = sparsify_attention(tiny_host("llama"))
    assert model.config.sparse_attention["top_k"] == KeyBudget().top_k


@pytest.mark.parametrize("name", ["qwen2", "power"])
def test_half_precision_stays_half_and_projections_stay_whole(name):
    model, inputs = dense_host(name).bfloat16(), inputs_of()
    before = logits(model, inputs)
    sparsify_attention(model, WIDE)
    assert torch.equal(logits(model, inputs), before)
    densify_attention(model)
    sparsify_attention(model, BUDGET, screening="learned", screen_dim=4)
    few = logits(model, inputs)
    assert few.dtype == torch.bfloat16 and few.isfinite().all() and not torch.equal(few, before)
    assert {m.screening.key.dtype for m in sparse_modules(model).values()} == {torch.float32}
