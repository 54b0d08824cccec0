"""What hosts ask of attention beside q, k, v: caps, sinks, biases, indexers, masks of heads."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from helpers import assert_within_budget
from hosts import logits, tiny_host, tiny_inputs
from torch import nn

from gravity_hf import GravityConfig, calibrate, patch_with_gravity
from gravity_hf.integration import attention
from gravity_hf.integration.arguments import fold, terms_of_call
from gravity_hf.integration.attention import gravity_attention_forward
from gravity_hf.integration.hosts import gravity_modules
from gravity_hf.integration.masks import gravity_mask
from gravity_hf.integration.observers import Moments
from gravity_hf.layers.parameters import GravityParameters
from gravity_hf.ops.reference import split_mask

ASKING = (
    "a cap on the scores",
    "attention sinks",
    "a learned position bias",
    "keys chosen by an indexer",
)
LOWEST = torch.finfo(torch.float32).min


class Spy:
    """Lets the host's or gravity's output flow on, and keeps calls and outputs."""

    def __init__(self, flows):
        self.flows, self.seen = flows, []

    def attend(self, call):
        output, weights = getattr(call, self.flows)()
        self.seen.append((call, output))
        return output, weights


def spied(model, inputs, flows):
    """Logits under spies, and what each gravity module was called with and answered."""
    spies = {name: Spy(flows) for name in gravity_modules(model)}
    for name, module in gravity_modules(model).items():
        module.observer = spies[name]
    try:
        return logits(model, inputs), spies
    finally:
        for module in gravity_modules(model).values():
            module.observer = None


def lively(peculiarity):
    """A host with eager attention whose sinks, biases and caps change what it says."""
    model = tiny_host(peculiarity, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("sinks"):
                parameter.copy_(torch.linspace(-1.0, 2.0, parameter.numel()))
    return model


def by_definition(call, dtype):
    """`[B, Tq, H, Dv]`, from the call's own arguments."""
    asked, terms = call.arguments, call.terms
    q, k, v = (x.to(dtype) for x in (call.query, call.key, call.value))
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    query_sq, kappa = q.square().sum(-1)[..., None], k.square().sum(-1)[:, :, None]
    if terms.key_radius_sq is not None:
        kappa = terms.key_radius_sq.to(dtype).repeat_interleave(groups)[:, None, None]
    strength, eps = terms.mass.to(dtype).square(), terms.softening.to(dtype)

    def law(distance_sq):
        softened = distance_sq + eps[:, None, None]
        return strength[:, None, None] / softened

    neutral = law(query_sq + kappa)
    score = law((query_sq + kappa - 2 * q @ k.mT).clamp(min=0))
    if asked.get("softcap") is not None:
        cap = asked["softcap"]
        score = neutral + cap * torch.tanh((score - neutral) / cap)
    if asked.get("position_bias") is not None:
        score = score + asked["position_bias"].to(dtype)
    if call.mask is not None:
        score = score.masked_fill(call.mask.to(dtype) < LOWEST / 2, -math.inf)
    if asked.get("indices") is not None:
        left_out = torch.ones(*q[:, 0, :, 0].shape, k.shape[2], dtype=torch.bool)
        left_out.scatter_(-1, asked["indices"].long(), False)
        score = score.masked_fill(left_out[:, None], -math.inf)
    if asked.get("s_aux") is not None:
        at_origin = torch.zeros_like(kappa[..., :1]) if terms.key_radius_sq is None else kappa
        sink = law(query_sq + at_origin) + asked["s_aux"].to(dtype)[:, None, None]
        score = torch.cat([score, sink], -1)
    return (score.softmax(-1)[..., : k.shape[2]] @ v).transpose(1, 2)


@pytest.fixture(scope="module", params=ASKING)
def case(request):
    """A calibrated host, its inputs, and what the host itself says to them."""
    model, inputs = lively(request.param), tiny_inputs(request.param)
    with torch.no_grad():
        host = model(**inputs, output_hidden_states=True)
    patch_with_gravity(model)
    calibrate(model, [inputs], softness=16.0, progress=False)
    return SimpleNamespace(name=request.param, model=model, inputs=inputs, host=host)


def test_every_call_is_the_definition_with_what_the_host_asks_for(case):
    _, spies = spied(case.model, case.inputs, "gravity")
    asked = {"softcap", "s_aux", "position_bias", "indices"}
    for spy in spies.values():
        for call, output in spy.seen:
            assert any(call.arguments.get(name) is not None for name in asked)
            exact, peer = (by_definition(call, t) for t in (torch.float64, torch.float32))
            assert_within_budget(case.name, output, exact, peer)


def test_the_host_s_own_attention_is_there_exactly(case):
    host, spies = spied(case.model, case.inputs, "dot_product")
    assert all(spy.seen for spy in spies.values())
    torch.testing.assert_close(host, case.host.logits, rtol=1e-6, atol=1e-6)


def test_a_calibrated_model_has_the_host_s_hidden_states(case):
    with torch.no_grad():
        output = case.model(**case.inputs, output_hidden_states=True)
    name = "decoder_hidden_states" if "decoder_hidden_states" in output else "hidden_states"
    for ours, host in zip(output[name], case.host[name], strict=True):
        assert torch.cosine_similarity(ours, host, dim=-1).min() > 0.99
    assert not torch.equal(output.logits, case.host.logits)


def test_scores_and_weights_tell_of_it_too(case):
    """`gravity_scores` and `dot_product_scores`, of which attention transfer takes its KL."""
    _, spies = spied(case.model, case.inputs, "dot_product")
    for spy in spies.values():
        call, host = spy.seen[0]
        value = call.value.repeat_interleave(call.query.shape[1] // call.value.shape[1], 1)
        keys = value.shape[2]
        for scores, output in (
            (call.dot_product_scores(), host),
            (call.gravity_scores(), call.gravity()[0]),
        ):
            ours = scores.softmax(-1)[..., :keys] @ value
            torch.testing.assert_close(ours.transpose(1, 2), output, rtol=1e-4, atol=1e-4)


def test_asked_for_weights_come_from_every_module(case):
    with torch.no_grad():
        output = case.model(**case.inputs, output_attentions=True)
    attentions = [a for name, a in output.items() if name.endswith("attentions") for a in a]
    assert len(attentions) == len(gravity_modules(case.model))
    plain = logits(case.model, case.inputs)
    assert (output.logits - plain).abs().max() < 1e-3 * plain.abs().max()
    for weights in attentions:
        total = weights.sum(-1)
        assert (
            (total < 1.0).all() if case.name == "attention sinks" else total.allclose(total * 0 + 1)
        )


@pytest.mark.parametrize("peculiarity", ASKING)
def test_modules_left_out_keep_the_host_s_attention(peculiarity):
    model, inputs = lively(peculiarity), tiny_inputs(peculiarity)
    with torch.no_grad():
        host = model(**inputs, output_attentions=True)
        patch_with_gravity(model, GravityConfig(layers=()))
        ours = model(**inputs, output_attentions=True)
    assert torch.equal(ours.logits, host.logits)
    name = "encoder_attentions" if "encoder_attentions" in host else "attentions"
    assert all(torch.equal(a, b) for a, b in zip(ours[name], host[name], strict=True))


@pytest.mark.parametrize(
    "peculiarity, parameter",
    [("attention sinks", "sinks"), ("a learned position bias", "relative_attention_bias.weight")],
)
def test_gradients_reach_what_the_host_learned(peculiarity, parameter):
    model, inputs = patch_with_gravity(lively(peculiarity)), tiny_inputs(peculiarity)
    model(**inputs).logits.square().mean().backward()
    learned = {n: p for n, p in model.named_parameters() if n.endswith(parameter)}
    assert learned
    name, weight = next(iter(learned.items()))
    where = weight.grad.abs().argmax()
    assert weight.grad.flatten()[where] != 0, name
    step, values = 1e-2, []
    for sign in (1, -1):
        with torch.no_grad():
            weight.view(-1)[where] += sign * step
            values.append(logits(model, inputs).double().square().mean())
            weight.view(-1)[where] -= sign * step
    slope = (values[0] - values[1]) / (2 * step)
    assert math.isclose(weight.grad.flatten()[where], slope, rel_tol=0.05)


@pytest.mark.parametrize("peculiarity", ["a cap on the scores", "attention sinks"])
def test_caps_and_sinks_cost_no_dense_mask(peculiarity, monkeypatch):
    seen = []

    def spy(*args, **kwargs):
        seen.append(kwargs)
        return operator(*args, **kwargs)

    operator = attention.gravity_attention
    monkeypatch.setattr(attention, "gravity_attention", spy)
    model = patch_with_gravity(tiny_host(peculiarity))
    logits(model, tiny_inputs(peculiarity))
    assert len(seen) == 3
    assert all(options["mask"] is None and options["causal"] for options in seen)
    assert {options["window"] for options in seen} == {5, None}


def called(heads=4, kv_heads=2, queries=5, keys=7, observer=None, **arguments):
    """One call of the registered function on a bare module with masses for 4 heads over 2."""
    module = nn.Module()
    module.gravity = GravityParameters(GravityConfig(), 4, 2)
    module.gravity.observer = observer
    q = torch.randn(2, heads, queries, 8)
    k, v = torch.randn(2, 2, kv_heads, keys, 8)
    mask = arguments.pop("mask", None)
    return (q, k, v), gravity_attention_forward(module, q, k, v, mask, **arguments)


def test_a_mask_of_heads_multiplies_the_weights():
    torch.manual_seed(0)
    factors = torch.tensor([0.0, 1.0, 0.5, 2.0])
    _, (masked, _) = called(head_mask=factors)
    torch.manual_seed(0)
    _, (whole, weights) = called(output_attentions=True)
    torch.testing.assert_close(masked, whole * factors[:, None])
    assert weights.shape == (2, 4, 5, 7)
    with pytest.raises(ValueError, match="head_mask: expected"):
        called(head_mask=torch.ones(3, 6, 1, 1))


def test_a_raw_padding_mask_hides_padding():
    padding = torch.ones(2, 7, dtype=torch.long)
    padding[1, 4:] = 0
    results = []
    for mask in (padding, padding.bool()[:, None, None], None):
        torch.manual_seed(0)
        results.append(called(mask=mask)[1][0])
    assert torch.equal(results[0], results[1])
    assert (results[0] - results[2])[1].abs().max() > 1e-3


def test_an_index_below_zero_selects_nothing():
    q, k = torch.randn(1, 2, 2, 8), torch.randn(1, 2, 6, 8)
    mask = torch.zeros(1, 1, 2, 6)
    mask[..., 5] = LOWEST
    indices = torch.tensor([[[0, 5, 2], [3, -1, -1]]], dtype=torch.int32)
    terms = terms_of_call(nn.Module(), q, k, mask, {"indices": indices})
    assert (terms.mask > LOWEST / 2).tolist() == [
        [[[True, False, True, False, False, False], [False, False, False, True, False, False]]]
    ]
    bare = terms_of_call(nn.Module(), q, k, None, {"indices": indices}).mask
    assert bare[0, 0].nonzero().tolist() == [[0, 0], [0, 2], [0, 5], [1, 3]]


def test_an_indexer_that_leaves_nothing_out_leaves_the_mask_alone():
    mask = gravity_mask(batch_size=1, q_length=6, kv_length=6)
    q, k = torch.randn(2, 1, 2, 6, 8)
    indices = torch.arange(6, dtype=torch.int32).expand(1, 6, 6)
    assert terms_of_call(nn.Module(), q, k, mask, {"indices": indices}).mask is mask


def test_sinks_of_every_query_are_understood_and_others_refused():
    q, k = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 7, 8)
    sinks = torch.randn(2, 4, 5, 1)
    read = terms_of_call(nn.Module(), q, k, None, {"sinks": sinks}).sinks
    assert torch.equal(read, sinks[..., 0])
    with pytest.raises(ValueError, match=r"sinks: expected \[H\] = \[4\].*got \(3,\)"):
        called(s_aux=torch.zeros(3))


@pytest.mark.parametrize("observer", [None, Moments()], ids=["attending", "calibrating"])
@pytest.mark.parametrize("heads, kv_heads", [(6, 2), (4, 4), (2, 1)])
def test_masses_for_other_heads_are_an_error_at_the_first_call(heads, kv_heads, observer):
    with pytest.raises(ValueError, match=rf"4 query heads.*got {heads} over {kv_heads}"):
        called(heads=heads, kv_heads=kv_heads, observer=observer)


def test_a_detached_call_teaches_the_host_nothing():
    name = "a learned position bias"
    model = patch_with_gravity(tiny_host(name))
    spies = {n: Spy("dot_product") for n in gravity_modules(model)}
    for n, module in gravity_modules(model).items():
        module.observer = spies[n]
    model(**tiny_inputs(name))
    call = spies["encoder.block.0.layer.0.SelfAttention"].seen[0][0]
    assert call.query.requires_grad and call.arguments["position_bias"].requires_grad
    call.detached().gravity()[0].square().sum().backward()
    learned = {n for n, parameter in model.named_parameters() if parameter.grad is not None}
    assert learned == {"encoder.block.0.layer.0.SelfAttention.gravity.mass_log"}


def test_blocks_of_keys_are_those_of_the_host_s_indexer():
    file = pytest.importorskip("transformers.models.minimax_m3_vl")
    torch.manual_seed(0)
    config = file.MiniMaxM3VLTextConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, dense_intermediate_size=48,
        shared_intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_local_experts=2, num_experts_per_tok=1,
        index_n_heads=2, index_head_dim=8, index_block_size=2, index_topk_blocks=3,
        index_local_blocks=1, layer_types=["full_attention", "minimax_m3_sparse"],
        mlp_layer_types=["dense", "dense"], initializer_range=0.3, rotary_dim=8,
    )  # fmt: skip
    model = file.MiniMaxM3VLTextModel(config).eval()
    model.set_attn_implementation("eager")
    inputs = {"input_ids": torch.randint(3, 97, (2, 11))}
    with torch.no_grad():
        host = model(**inputs).last_hidden_state
        patch_with_gravity(model)
        spies = {name: Spy("dot_product") for name in gravity_modules(model)}
        for name, module in gravity_modules(model).items():
            module.observer = spies[name]
        torch.testing.assert_close(model(**inputs).last_hidden_state, host)
        call = spies["layers.1.self_attn"].seen[0][0]
        seen = call.host_terms.mask > LOWEST / 2
        causal = call.mask > LOWEST / 2
        assert (seen & ~causal).sum() == 0 and seen.sum() < causal.expand_as(seen).sum()
        # Each group of heads has a choice of its own.
        assert torch.equal(seen[:, 0], seen[:, 1]) and not torch.equal(seen[:, 1], seen[:, 2])
        for module in gravity_modules(model).values():
            module.observer = None
        calibrate(model, [inputs], softness=16.0, progress=False)
        ours = model(**inputs).last_hidden_state
    assert torch.cosine_similarity(ours, host, dim=-1).min() > 0.99


def test_arguments_without_a_meaning_are_refused_by_name():
    """F15: swallowed in **kwargs they would be silently wrong."""
    with pytest.raises(ValueError, match="argument `cache`: a paged cache"):
        called(cache=object())


def test_what_a_half_precision_mask_hides_stays_hidden_under_a_float32_bias():
    mask = torch.tensor([[0.0, torch.finfo(torch.float16).min]], dtype=torch.float16)
    bias = torch.tensor([[1.0, 2.0]])
    visible, added = split_mask(fold(mask[None, None], bias[None, None]))
    assert visible.flatten().tolist() == [True, False] and added.flatten()[0] == 1.0
