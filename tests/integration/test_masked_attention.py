"""What a mask says reaches the operator, and gives what the mask's values give."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from hosts import _DECODER, logits, tiny_host, tiny_inputs
from torch import Tensor

from gravity_hf import GravityConfig, calibrate, patch_with_gravity
from gravity_hf.integration import attention
from gravity_hf.integration.masks import DeferredMask

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
WORDS = ("mask", "causal", "window", "key_ranges")


@pytest.fixture
def received(monkeypatch) -> list[dict[str, Any]]:
    """What `gravity_attention` is told about visible keys, call by call."""
    calls: list[dict[str, Any]] = []
    original = attention.gravity_attention

    def spy(*args: Tensor, **options: Any) -> Tensor:
        calls.append({word: options.get(word) for word in WORDS})
        return original(*args, **options)

    monkeypatch.setattr(attention, "gravity_attention", spy)
    return calls


@pytest.fixture
def by_values(monkeypatch):
    """Runs something with masks that say nothing, so that their values are what counts."""

    def run(function):
        with monkeypatch.context() as patch:
            patch.setattr(attention, "visible_keys_of", lambda mask: None)
            return function()

    return run


def gravity_host(family: str, **overrides: Any) -> torch.nn.Module:
    model = patch_with_gravity(tiny_host(family, **overrides))
    calibrate(model, [tiny_inputs(family)])
    return model


def gemma3() -> torch.nn.Module:
    """Every other layer has a window of four."""
    torch.manual_seed(0)
    arguments = {**_DECODER, "num_hidden_layers": 4, "head_dim": 8, "sliding_window": 4}
    kinds = ["sliding_attention", "full_attention"] * 2
    config = transformers.Gemma3TextConfig(**arguments, layer_types=kinds)
    return patch_with_gravity(transformers.Gemma3ForCausalLM(config).eval())


def case(name: str) -> tuple[str, dict[str, Tensor]]:
    family = {"window": "mistral", "encoder": "bert", "cross": "cross attention"}.get(
        name.split()[0], "qwen2"
    )
    inputs = tiny_inputs(family)
    if "left" in name:
        inputs["attention_mask"][0, :4] = 0
    if "right" in name:
        inputs["attention_mask"][0, -3:] = 0
    if "holes" in name:
        inputs["attention_mask"][1, 2:4] = 0
    if "packed" in name:
        inputs = {"input_ids": inputs["input_ids"], "use_cache": False}
        inputs["position_ids"] = torch.tensor([[*range(6), *range(5)], [*range(4), *range(7)]])
    return family, inputs


@pytest.mark.parametrize("name", [
    "plain", "left", "right", "holes", "packed", "window", "window left", "window packed",
    "encoder", "encoder right", "encoder holes", "cross", "cross right",
])  # fmt: skip
def test_what_the_mask_says_gives_what_its_values_give(name, received, by_values):
    family, inputs = case(name)
    model = gravity_host(family)
    del received[:]
    said = logits(model, inputs)
    hides_keys = name.split()[-1] in ("left", "right", "holes", "packed")
    assert any(call["key_ranges"] is not None for call in received) == hides_keys
    for call in received:
        # Where padding has holes, one row for all queries; never a dense mask.
        assert (call["mask"] is not None) == ("holes" in name)
        assert call["mask"] is None or call["mask"].shape == (2, 1, 1, 11)
    if family in ("qwen2", "mistral"):
        window = 5 if family == "mistral" else None
        assert all(call["causal"] and call["window"] == window for call in received)

    del received[:]
    valued = by_values(lambda: logits(model, inputs))
    assert any(call["mask"] is not None for call in received) == (name != "encoder")
    torch.testing.assert_close(said, valued, **TOLERANCE)


@pytest.mark.parametrize("name", ["left", "packed", "window right", "encoder holes", "cross right"])
def test_a_converted_model_never_makes_a_dense_mask(name, monkeypatch):
    """At 32k tokens it would be two gigabytes per kind of mask."""

    def refuse(mask: DeferredMask) -> Tensor:
        raise AssertionError("the values of a mask were asked for")

    family, inputs = case(name)
    model = patch_with_gravity(tiny_host(family)).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    monkeypatch.setattr(DeferredMask, "filled", refuse)
    model(**inputs).logits.sum().backward()


def test_cross_attention_is_told_of_the_encoder_s_padding_only(received):
    family, inputs = case("cross right")
    inputs["decoder_input_ids"] = inputs["decoder_input_ids"][:, :7]
    logits(gravity_host(family), inputs)
    cross = [c for c in received[-4:] if not c["causal"]]
    assert [c["key_ranges"].tolist() for c in cross] == [[[[0, 8]], [[0, 11]]]] * 2


def test_layers_with_and_without_a_window_are_each_told_their_own(received, by_values):
    model, (_, inputs) = gemma3(), case("left")
    said = logits(model, inputs)
    assert [call["window"] for call in received] == [4, None] * 2
    torch.testing.assert_close(said, by_values(lambda: logits(model, inputs)), **TOLERANCE)


GENERATION = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("build", [lambda: gravity_host("qwen2"), gemma3], ids=["qwen2", "gemma3"])
def test_generation_reads_the_filled_part_of_a_cache(build, cache, received, by_values):
    model, (_, inputs) = build(), case("left")
    options = {**GENERATION, "cache_implementation": cache}
    del received[:]
    said = model.generate(**inputs, **options)
    assert all(call["mask"] is None for call in received)
    full = [call for call in received if call["window"] is None]
    last = full[-1]["key_ranges"].tolist()
    assert last == [[[4, 18]], [[0, 18]]]
    assert torch.equal(said, by_values(lambda: model.generate(**inputs, **options)))


def test_generation_in_inference_mode_is_told_the_same(received):
    model, (_, inputs) = gravity_host("qwen2"), case("left")
    expected = model.generate(**inputs, **GENERATION)
    del received[:]
    with torch.inference_mode():
        inputs = {name: tensor.clone() for name, tensor in inputs.items()}
        assert torch.equal(model.generate(**inputs, **GENERATION), expected)
    assert len(received) == 3 * 8 and all(call["mask"] is None for call in received)


def test_generation_without_padding_is_told_of_no_ranges(received):
    model = gravity_host("qwen2")
    del received[:]
    model.generate(**tiny_inputs("qwen2"), **GENERATION)
    assert len(received) == 3 * 8 and all(call["key_ranges"] is None for call in received)
    assert [call["causal"] for call in received] == [True] * 3 + [False] * 21


def test_several_tokens_into_a_filled_cache(received, by_values):
    model, (_, inputs) = gravity_host("qwen2"), case("left")

    def second_half():
        first = {name: tensor[:, :6] for name, tensor in inputs.items()}
        with torch.no_grad():
            cache = model(**first, use_cache=True).past_key_values
            rest = {**inputs, "input_ids": inputs["input_ids"][:, 6:]}
            return model(**rest, past_key_values=cache).logits

    said = second_half()
    assert received[-1]["causal"] and received[-1]["key_ranges"].tolist() == [[[4, 11]], [[0, 11]]]
    torch.testing.assert_close(said, by_values(second_half), **TOLERANCE)


@pytest.mark.parametrize("additive", [False, True], ids=["bool", "additive"])
def test_a_mask_of_the_caller_s_own_is_taken_as_it_is(additive, received):
    model, inputs = gravity_host("qwen2"), tiny_inputs("qwen2")
    expected = logits(model, inputs)
    mask = torch.ones(11, 11, dtype=torch.bool).tril().expand(2, 1, 11, 11)
    if additive:
        mask = torch.zeros(2, 1, 11, 11).masked_fill(~mask, torch.finfo(torch.float32).min)
    inputs["attention_mask"] = mask
    del received[:]
    torch.testing.assert_close(logits(model, inputs), expected, **TOLERANCE)
    assert all(call["mask"] is mask and call.get("causal") is None for call in received)


def test_a_mask_computed_from_ours_is_used_by_its_values(received, monkeypatch):
    """Models slice and move their masks; what comes out is an ordinary tensor."""
    model, (_, inputs) = gravity_host("qwen2"), case("left")
    expected = logits(model, inputs)
    original = attention.gravity_attention_forward

    def forward(module, query, key, value, attention_mask, **options):
        return original(module, query, key, value, attention_mask[:, :, :, :11] * 1.0, **options)

    transformers.AttentionInterface.register("gravity", forward)
    try:
        del received[:]
        torch.testing.assert_close(logits(model, inputs), expected, **TOLERANCE)
    finally:
        transformers.AttentionInterface.register("gravity", original)
    assert all(call["mask"].is_floating_point() for call in received)


def test_layers_left_on_dot_product_get_the_values(received, by_values):
    inputs = case("left")[1]
    model = patch_with_gravity(tiny_host("qwen2"), GravityConfig(layers=(0, 2)))
    said = logits(model, inputs)
    assert len(received) == 2 and all(call["mask"] is None for call in received)
    torch.testing.assert_close(said, by_values(lambda: logits(model, inputs)), **TOLERANCE)


def test_output_attentions_are_computed_from_the_values(by_values):
    model, (_, inputs) = gravity_host("bert"), case("encoder right")
    with torch.no_grad():
        weights = model(**inputs, output_attentions=True).attentions
    assert all((w[0, :, :, -3:] == 0).all() and (w[1, :, :, -3:] > 0).any() for w in weights)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["left", "window packed"])
def test_checkpointing_recomputes_with_the_same_words(name, reentrant, received, by_values):
    family, inputs = case(name)

    def gradients(checkpointing):
        model = patch_with_gravity(tiny_host(family)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        return {name: p.grad for name, p in model.named_parameters()}

    checkpointed = gradients(True)
    assert len(received) == 6 and all(call["mask"] is None for call in received)
    valued = by_values(lambda: gradients(False))
    for parameter, gradient in valued.items():
        torch.testing.assert_close(checkpointed[parameter], gradient, msg=parameter, **TOLERANCE)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["left", "right", "holes", "packed", "window left", "cross right"])
def test_on_a_gpu_what_the_mask_says_gives_what_its_values_give(name, by_values):
    family, inputs = case(name)
    inputs = {k: v.cuda() if isinstance(v, Tensor) else v for k, v in inputs.items()}
    model = gravity_host(family).cuda()
    said = logits(model, inputs)
    valued = by_values(lambda: logits(model, inputs))
    torch.testing.assert_close(said, valued, rtol=1e-3, atol=1e-3 * valued.abs().max().item())


@pytest.mark.gpu
def test_no_layer_waits_for_the_device():
    model, (_, inputs) = gravity_host("qwen2").cuda(), case("left")
    inputs = {name: tensor.cuda() for name, tensor in inputs.items()}
    expected = logits(model, inputs)
    original = attention.gravity_attention_forward

    def forward(*args: Any, **options: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return original(*args, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    transformers.AttentionInterface.register("gravity", forward)
    try:
        torch.testing.assert_close(logits(model, inputs), expected)
    finally:
        transformers.AttentionInterface.register("gravity", original)
