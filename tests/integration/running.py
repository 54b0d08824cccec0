"""Patched hosts for tests of the ways to run a model, and the proof that gravity ran in them."""

from __future__ import annotations

from typing import Any, NamedTuple

import hosts
import pytest
import torch
import transformers
from hosts import FAMILIES, PECULIAR, tiny_inputs
from torch import Tensor, nn
from transformers import PreTrainedModel

from gravity_hf import GravityConfig, calibrate, patch_with_gravity
from gravity_hf.integration import attention

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}
WINDOW = 5
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1}
# As in `hosts`: config class, model class, arguments.
_MORE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma3": (
        "Gemma3TextConfig",
        "Gemma3ForCausalLM",
        {
            **FAMILIES["qwen2"][2],
            "head_dim": 12,
            "query_pre_attn_scalar": 12,
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "bart": (*PECULIAR["cross attention"][:2], {**PECULIAR["cross attention"][2], **_TOKENS}),
    "whisper": (
        "WhisperConfig",
        "WhisperForConditionalGeneration",
        {
            **PECULIAR["cross attention"][2],
            **_TOKENS,
            "num_mel_bins": 8,
            "max_source_positions": 10,
            "max_target_positions": 64,
            "suppress_tokens": None,
            "begin_suppress_tokens": None,
        },
    ),
}


def host(name: str, **overrides: Any) -> PreTrainedModel:
    """A fresh random model, in eval mode."""
    if name not in _MORE:
        return hosts.tiny_host(name, **overrides)
    config_class, model_class, arguments = _MORE[name]
    torch.manual_seed(0)
    config = getattr(transformers, config_class)(**{**arguments, **overrides})
    return getattr(transformers, model_class)(config).eval()


def inputs_of(name: str, **options: Any) -> dict[str, Tensor]:
    """What a forward of the model takes; no padding."""
    if name == "whisper":
        ids = tiny_inputs("qwen2", **options)["input_ids"]
        features = torch.randn(len(ids), 8, 20, generator=torch.Generator().manual_seed(1))
        return {"input_features": features, "decoder_input_ids": ids}
    return tiny_inputs("cross attention" if name == "bart" else name, **options)


def gravity_host(
    name: str, config: GravityConfig | None = None, *, softness: float = 0.25, **overrides: Any
) -> PreTrainedModel:
    """Patched and calibrated: neither the host again, nor a lookup of the nearest key."""
    model = patch_with_gravity(host(name, **overrides), config)
    calibrate(model, [inputs_of(name)], softness=softness)
    return model


def left_padded(name: str, **options: Any) -> dict[str, Tensor]:
    """Inputs of a decoder whose first row starts with four tokens of padding."""
    inputs = inputs_of(name, **options)
    inputs["input_ids"][0, :4] = inputs["attention_mask"][0, :4] = 0
    return inputs


class Run(NamedTuple):
    """text: `[B, T]`. logits: of the new tokens, `[B, new, V]`. calls: of the operator, outside of
    compiled graphs. scores: of beams. cache: as `generate` left it; None without one."""

    text: Tensor
    logits: Tensor
    calls: int
    scores: Tensor | None
    cache: Any


def generate(model: nn.Module, inputs: dict[str, Tensor], **options: Any) -> Run:
    """Twelve new tokens, more than any window holds; greedy if nothing else is asked for."""
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, **options}
    calls = 0
    original = attention.gravity_attention

    def counting(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        # A graph that counts would be compiled anew for every count.
        if not torch.compiler.is_compiling():
            calls += 1
        return original(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "gravity_attention", counting)
        result = model.generate(
            **inputs, **options, return_dict_in_generate=True, output_logits=True
        )
    scores = getattr(result, "sequences_scores", None)
    cache = getattr(result, "past_key_values", None)
    return Run(result.sequences, torch.stack(result.logits, 1), calls, scores, cache)


def assert_same(actual: Run, expected: Run) -> None:
    """Same text, same logits, by gravity."""
    assert actual.calls > 0
    assert torch.equal(actual.text, expected.text)
    torch.testing.assert_close(actual.logits, expected.logits, **TOLERANCE)


def assert_unlike_the_host(run: Run, name: str, inputs: dict[str, Tensor]) -> None:
    """The first new token is predicted from the same prompt, by another attention."""
    difference = run.logits[:, 0] - generate(host(name), inputs).logits[:, 0]
    assert difference.abs().max() > 1e-2
