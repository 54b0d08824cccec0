"""Every cache of transformers holds what gravity needs: the text does not depend on it."""

from __future__ import annotations

import functools

import pytest
import torch
import transformers
from integration.running import (
    WINDOW,
    Run,
    assert_same,
    assert_unlike_the_host,
    generate,
    gravity_host,
    host,
    inputs_of,
    left_padded,
)
from torch import Tensor, nn
from transformers import CompileConfig, EncoderDecoderCache, QuantizedCache

from gravity_hf import GravityConfig

DECODERS = ["qwen2", "mistral", "gemma3", "a cap on the scores", "attention sinks"]
ENCODER_DECODERS = ["bart", "whisper", "a learned position bias"]
# 4 bits, in groups of the tiny models' size, after few enough tokens to matter to them.
QUANTISED = {"backend": "quanto", "nbits": 4, "q_group_size": 32, "residual_length": 4}
WIDE = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}

model_of = functools.cache(gravity_host)


@functools.cache
def without_cache(family: str) -> Run:
    return generate(model_of(family), prompt_of(family), use_cache=False)


def prompt_of(family: str) -> dict[str, Tensor]:
    if family not in ENCODER_DECODERS:
        return left_padded(family)
    inputs = inputs_of(family)
    del inputs["decoder_input_ids"]
    return inputs


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", DECODERS)
def test_the_text_is_the_same_with_a_cache(family, cache):
    run = generate(model_of(family), prompt_of(family), cache_implementation=cache)
    assert_same(run, without_cache(family))
    # The prompt and each token but the last, in three layers.
    assert run.calls == 3 * 12
    assert_unlike_the_host(run, family, prompt_of(family))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family, windows", [("mistral", 3), ("gemma3", 2)])
def test_a_window_cache_holds_the_window_and_no_more(family, windows, cache):
    run = generate(model_of(family), prompt_of(family), cache_implementation=cache)
    held = [layer for layer in run.cache.layers if "SlidingWindow" in type(layer).__name__]
    assert len(held) == windows
    assert all(layer.keys.shape[-2] <= WINDOW for layer in held)


def test_a_window_of_a_static_cache_is_compiled_like_the_rest():
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    static = {"cache_implementation": "static", "compile_config": config}
    run = generate(model_of("gemma3"), prompt_of("gemma3"), **static)
    assert_same(run, without_cache("gemma3"))
    # Only the prompt is not compiled.
    assert run.calls == 3


@pytest.mark.parametrize("family", DECODERS[:3])
def test_a_conversation_goes_on_from_its_cache(family):
    model, inputs = model_of(family), inputs_of(family, batch=1)
    first = generate(model, inputs)
    text = torch.cat([first.text, inputs["input_ids"]], 1)
    # Without a mask `generate` would take generated tokens that happen to be 0 for padding.
    longer = {"input_ids": text, "attention_mask": torch.ones_like(text)}
    fresh = generate(model, longer)
    continued = generate(model, longer, past_key_values=first.cache)
    assert_same(continued, fresh)


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("family", ENCODER_DECODERS)
def test_the_text_of_an_encoder_decoder_is_the_same_with_a_cache(family, cache):
    run = generate(model_of(family), prompt_of(family), cache_implementation=cache)
    assert isinstance(run.cache, EncoderDecoderCache)
    assert_same(run, without_cache(family))
    assert_unlike_the_host(run, family, prompt_of(family))


def decoded(model: nn.Module, ids: Tensor, cache: QuantizedCache) -> Tensor:
    """Logits of every token, a prompt of 16 at once and the rest one by one from the cache."""
    with torch.no_grad():
        rows = [model(ids[:, :16], past_key_values=cache, use_cache=True).logits]
        for token in ids[:, 16:].split(1, 1):
            rows.append(model(token, past_key_values=cache, use_cache=True).logits)
    return torch.cat(rows, 1)


def error_of_a_quantised_cache(model: nn.Module, ids: Tensor) -> float:
    with torch.no_grad():
        exact = model(ids).logits
    rough = decoded(model, ids, QuantizedCache(config=model.config, **QUANTISED))
    return float((rough - exact).norm() / exact.norm())


@pytest.mark.parametrize("law", ["force", "power"])
def test_keys_of_a_quantised_cache_cost_gravity_about_what_they_cost_the_host(law):
    """A distance holds the key's error twice, in |k|^2 and in q.k; lifted keys hold it once."""
    pytest.importorskip("optimum.quanto")
    ids = inputs_of("qwen2", length=48)["input_ids"]
    of_host = error_of_a_quantised_cache(host("qwen2", **WIDE), ids)
    model = gravity_host("qwen2", GravityConfig(law=law), softness=0.25, **WIDE)
    of_gravity = error_of_a_quantised_cache(model, ids)
    assert 0.01 < of_gravity < 1.25 * of_host


def test_generation_from_a_quantised_cache_is_gravity_on_its_keys():
    pytest.importorskip("optimum.quanto")
    inputs = inputs_of("qwen2", length=20)
    quantised = {"cache_implementation": "quantized", "cache_config": QUANTISED}
    runs = [
        generate(gravity_host("qwen2", GravityConfig(implementation=name), **WIDE), inputs, **more)
        for name, more in (("chunked", quantised), ("reference", quantised), ("chunked", {}))
    ]
    assert isinstance(runs[0].cache, QuantizedCache)
    assert_same(runs[0], runs[1])
    # The keys really were rounded.
    assert (runs[0].logits[:, 1] - runs[2].logits[:, 1]).abs().max() > 1e-3


@pytest.mark.gpu
@pytest.mark.parametrize("cache", ["offloaded", "offloaded_static"])
@pytest.mark.parametrize("family", DECODERS)
def test_the_text_is_the_same_with_an_offloaded_cache(family, cache):
    """Where transformers' own cache gives the host the same text: in 5.17 the static one races with
    its prefetching stream, and neither knows models whose layers all have windows."""
    inputs = {name: tensor.cuda() for name, tensor in prompt_of(family).items()}
    if not _host_is_served(family, inputs, cache):
        pytest.skip(f"transformers {transformers.__version__} does not serve the host with {cache}")
    model = gravity_host(family).cuda()
    expected = generate(model, inputs, use_cache=False)
    run = generate(model, inputs, cache_implementation=cache, disable_compile=True)
    assert_same(run, expected)
    assert run.calls == 3 * 12


def _host_is_served(family, inputs, cache):
    plain = host(family).cuda()
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    options |= {"disable_compile": True}
    expected = plain.generate(**inputs, use_cache=False, **options)
    try:
        runs = [plain.generate(**inputs, cache_implementation=cache, **options) for _ in range(20)]
    except ValueError:
        return False
    return all(torch.equal(run, expected) for run in runs)
