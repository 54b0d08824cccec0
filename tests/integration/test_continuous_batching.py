"""`generate_batch` on patched models: the text of `generate`, and nothing else changed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from hosts import logits, tiny_host, tiny_inputs
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    ContinuousBatchingConfig,
    GenerationConfig,
    PreTrainedModel,
)
from transformers.generation.continuous_batching import continuous_api

from gravity_hf import GravityConfig, gravity_lora, patch_with_gravity, unpatch_gravity
from gravity_hf.integration import attention
from gravity_hf.integration.carrier import CARRIER_NAME
from gravity_hf.integration.paging import gravity_serving

# The third is longer than a batch: it is read in pieces, beside others that write already.
PROMPTS = [[5, 6, 7, 8, 9], [11, 12], [*range(20, 40)], [40]]
GREEDY = GenerationConfig(max_new_tokens=6, do_sample=False, eos_token_id=96, pad_token_id=0)
PAGE = 8
_FIELDS = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}
_PAGE = {"page_size" if "page_size" in _FIELDS else "block_size": PAGE}

Outputs = list[tuple[list[int], list[float]]]


def batching(**options: Any) -> ContinuousBatchingConfig:
    small = {"num_blocks": 32, "max_batch_tokens": 12, "return_logprobs": True}
    return ContinuousBatchingConfig(**{**small, **_PAGE, **options})


def batched(model: Any, prompts: list[list[int]] = PROMPTS, **options: Any) -> Outputs:
    """Tokens of every request and their log-probabilities, in the order of the prompts."""
    outputs = model.generate_batch(
        prompts, generation_config=GREEDY, continuous_batching_config=batching(**options)
    )
    return [(output.generated_tokens, output.logprobs) for output in outputs.values()]


def one_by_one(model: Any, prompts: list[list[int]] = PROMPTS) -> Outputs:
    return [_generated(model, torch.tensor([prompt])) for prompt in prompts]


def _generated(model: Any, ids: Tensor) -> tuple[list[int], list[float]]:
    result = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GREEDY,
        return_dict_in_generate=True,
        output_logits=True,
    )
    tokens = result.sequences[0, ids.shape[1] :].tolist()
    logprobs = [scores[0].log_softmax(-1) for scores in result.logits]
    return tokens, [p[token].item() for p, token in zip(logprobs, tokens, strict=True)]


def assert_same(actual: Outputs, expected: Outputs) -> None:
    assert [tokens for tokens, _ in actual] == [tokens for tokens, _ in expected]
    for (_, ours), (_, theirs) in zip(actual, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)


def small_host(family: str = "qwen2", **overrides: Any) -> PreTrainedModel:
    return tiny_host(family, **{"num_hidden_layers": 2, **overrides})


def gravity_host(family: str = "qwen2", **overrides: Any) -> PreTrainedModel:
    return patch_with_gravity(small_host(family, **overrides))


def capped_host() -> PreTrainedModel:
    """Gemma 2: a cap on the scores, windows in every other layer."""
    return _built("Gemma2", attn_logit_softcapping=2.0, sliding_window=5, head_dim=8)


def host_with_sinks() -> PreTrainedModel:
    """GPT-OSS: an attention sink for each head, windows in every other layer."""
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1}
    model = _built("GptOss", sliding_window=5, head_dim=8, **experts)
    for layer in model.model.layers:
        torch.nn.init.normal_(layer.self_attn.sinks)
    return model


def _built(name: str, **options: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.2}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = getattr(transformers, f"{name}Config")(**sizes, **heads, **tokens, **options)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


HOSTS: dict[str, Callable[[], PreTrainedModel]] = {
    "grouped queries": small_host,
    "sliding window": lambda: small_host("mistral"),
    "softcap": capped_host,
    "sinks": host_with_sinks,
}


@pytest.fixture
def gravity_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many queries each call of the operator had."""
    calls: list[int] = []
    operator = attention.gravity_attention

    def counted(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(query.shape[2])
        return operator(query, *args, **kwargs)

    monkeypatch.setattr(attention, "gravity_attention", counted)
    return calls


@pytest.mark.parametrize("name", HOSTS)
def test_batched_text_is_that_of_single_requests(name: str, gravity_calls: list[int]) -> None:
    """Requests of several lengths, read in pieces and written side by side in one row; caps, sinks
    and windows hold there too."""
    model = HOSTS[name]()
    plain = batched(model)
    expected = one_by_one(patch_with_gravity(model))
    gravity_calls.clear()
    with gravity_serving(model):
        outputs = batched(model)
    assert_same(outputs, expected)
    assert outputs != plain
    assert gravity_calls and len(gravity_calls) % 2 == 0  # both layers, every pass


def test_layers_that_keep_dot_product_batch_as_they_generate(gravity_calls: list[int]) -> None:
    model = patch_with_gravity(small_host(), GravityConfig(layers=[1]))
    expected = one_by_one(model)
    with gravity_serving(model):
        assert_same(batched(model), expected)
    assert gravity_calls


def test_a_lora_model_batches_as_it_generates() -> None:
    model = gravity_lora(gravity_host(), r=2).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    expected = one_by_one(model)
    with gravity_serving(model):
        assert_same(batched(model), expected)


def test_a_shared_beginning_is_computed_once(gravity_calls: list[int]) -> None:
    """With one request at a time the second finds the first one's full pages in the cache."""
    model = gravity_host()
    beginning = [*range(10, 10 + 2 * PAGE)]
    prompts = [[*beginning, 50], [*beginning, 60, 61]]
    expected = one_by_one(model, prompts)
    seen = {}
    for sharing in (False, True):
        gravity_calls.clear()
        options = {"allow_block_sharing": sharing, "max_requests_per_batch": 1}
        with gravity_serving(model):
            assert_same(batched(model, prompts, **options), expected)
        seen[sharing] = sum(gravity_calls)
    assert seen[False] - seen[True] == 2 * len(beginning)  # in both layers


def test_generate_inside_is_generate_outside(gravity_calls: list[int]) -> None:
    """Left-padded, so that the mask matters."""
    model = gravity_host("mistral")
    ids = torch.tensor([[0, 0, 0, 5, 6, 7], [8, 9, 10, 11, 12, 13]])
    inputs = {"input_ids": ids, "attention_mask": (ids != 0).long()}
    outside = model.generate(**inputs, generation_config=GREEDY)
    gravity_calls.clear()
    with gravity_serving(model):
        inside = model.generate(**inputs, generation_config=GREEDY)
    assert torch.equal(inside, outside)
    assert gravity_calls


@pytest.mark.parametrize("name", ["sdpa", "eager", CARRIER_NAME])
def test_plain_models_are_untouched_inside(name: str, gravity_calls: list[int]) -> None:
    plain = small_host(seed=1)
    plain.set_attn_implementation(name)
    before = batched(plain)
    with gravity_serving(gravity_host()):
        assert batched(plain) == before
        assert plain.config._attn_implementation == name
    assert not gravity_calls


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_plain_models_compute_the_same_inside(name: str, gravity_calls: list[int]) -> None:
    plain, inputs = small_host(seed=1), tiny_inputs("qwen2")
    plain.set_attn_implementation(name)
    before = logits(plain, inputs)
    with gravity_serving(gravity_host()):
        assert torch.equal(logits(plain, inputs), before)
    assert not gravity_calls


@pytest.mark.parametrize("version", [2, 3])
def test_flash_is_never_put_in_place_of_gravity(
    version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = gravity_host()
    expected = one_by_one(model)
    available = f"is_flash_attn_{version}_available"
    monkeypatch.setattr(continuous_api, available, lambda *args, **kwargs: True)
    with gravity_serving(model):
        assert_same(batched(model), expected)
        assert model.config._attn_implementation == CARRIER_NAME
    with pytest.raises(ValueError, match="gravity_serving"):
        batched(model)


def registries() -> tuple[dict[str, Any], dict[str, Any]]:
    return dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)


def names(*models: PreTrainedModel) -> list[str]:
    return [m.config._attn_implementation for m in models]


def test_everything_is_as_before_after_an_exception() -> None:
    before, model = registries(), gravity_host()
    with pytest.raises(KeyError), gravity_serving(model):
        assert registries() != before
        raise KeyError
    assert registries() == before
    assert names(model) == ["gravity"]


def test_contexts_nest_and_end_in_any_order() -> None:
    before, one, two = registries(), gravity_host(), gravity_host()
    expected = one_by_one(one)
    first, second = gravity_serving(one, two), gravity_serving(one)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert names(one, two) == [CARRIER_NAME, "gravity"]
    assert_same(batched(one), expected)
    second.__exit__(None, None, None)
    assert names(one, two) == ["gravity", "gravity"]
    assert registries() == before


def test_unpatching_inside_gives_the_host_back() -> None:
    before, model = registries(), small_host()
    expected = batched(model)
    with gravity_serving(patch_with_gravity(model)):
        unpatch_gravity(model)
        assert batched(model) == expected
    assert names(model) == ["sdpa"]
    assert registries() == before


def test_models_that_cannot_be_served_are_refused_before_anything_changes() -> None:
    before, served = registries(), gravity_host()
    refusals = {
        "patched with gravity": (RuntimeError, small_host()),
        "BertForMaskedLM": (TypeError, gravity_host("bert")),
        "BartForConditional": (TypeError, patch_with_gravity(tiny_host("cross attention"))),
    }
    for message, (error, model) in refusals.items():
        with pytest.raises(error, match=message), gravity_serving(served, model):
            pass
    assert registries() == before
    assert names(served) == ["gravity"]


def test_a_transformers_that_batches_differently_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the masks every request would read all others."""
    before, model = registries(), gravity_host()
    utils = "transformers.generation.continuous_batching.utils.attn_mask_is_needed"
    monkeypatch.setattr(utils, lambda config: False)
    expected = f"masks for .*{transformers.__version__}"
    with pytest.raises(NotImplementedError, match=expected), gravity_serving(model):
        pass
    assert registries() == before


@pytest.mark.gpu
@pytest.mark.parametrize("implementation", ["chunked", "triton"])
def test_a_gpu_batches_as_it_generates(implementation: str) -> None:
    settings = GravityConfig(implementation=implementation)
    model = patch_with_gravity(small_host("mistral"), settings).cuda()
    expected = [_generated(model, torch.tensor([prompt], device="cuda")) for prompt in PROMPTS]
    with gravity_serving(model):
        assert_same(batched(model), expected)


def test_a_manager_that_starts_after_the_context_gives_no_text_of_its_own():
    """The batcher makes its mask when it starts: outside, requests would see each other."""
    model = gravity_host()
    with gravity_serving(model):
        manager = model.init_continuous_batching(
            generation_config=GREEDY, continuous_batching_config=batching()
        )
    manager.start()
    try:
        ids = [manager.add_request(prompt, max_new_tokens=6) for prompt in PROMPTS]
        results = [manager.get_result(request_id=name, timeout=20) for name in ids]
    except Exception as error:
        assert "gravity_serving" in str(error)
        return
    finally:
        manager.stop(block=True, timeout=20)
    assert all(result is None or result.error is not None for result in results)
