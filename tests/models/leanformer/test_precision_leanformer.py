"""In half precision and under autocast a LeanFormer computes what it does in float32, rounded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from .lean_cases import IDS, OPTIONS, logits, padded, tiny

# What a choice turns on a rounding is no rounding error: all keys and neurons.
EVERYTHING = {"attention_top_k": 30, "feed_forward_sparsity": 0.0, "exit_threshold": None}


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close(option: str, dtype: torch.dtype) -> None:
    given = padded("left")
    exact = logits(tiny(option, **EVERYTHING).double(), given.ids, attention_mask=given.mask)
    half = logits(tiny(option, **EVERYTHING).to(dtype), given.ids, attention_mask=given.mask)
    assert half.dtype == dtype
    unit = torch.finfo(dtype).eps * exact.abs().max()
    real = given.mask.bool()
    assert (half - exact)[real].abs().max() < 12 * unit
    sparse = logits(tiny(option).to(dtype), given.ids, attention_mask=given.mask)
    assert sparse.isfinite().all()


@pytest.mark.parametrize("option", OPTIONS)
def test_autocast_is_close_and_trains(option: str) -> None:
    model = tiny(option, **EVERYTHING)
    exact = logits(model, IDS)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = logits(model, IDS)
        loss = tiny(option).train()(IDS, labels=IDS).loss
    assert (rounded - exact).abs().max() < 12 * 2**-8 * exact.abs().max()
    loss.backward()
    assert loss.isfinite()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_folder_is_loaded_in_the_dtype_that_is_asked_for(
    dtype: torch.dtype, tmp_path: Path
) -> None:
    """Constants of gravity and frequencies stay as they are."""
    model = tiny("gravity")
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    kinds = {name: value.dtype for name, value in loaded.named_parameters()}
    single = {name for name, kind in kinds.items() if kind == torch.float32}
    assert single == {name for name in kinds if ".gravity." in name}
    frequencies = model.model.rotary_emb.inv_freq
    for other in (loaded, tiny("gravity").to(dtype)):
        assert torch.equal(other.model.rotary_emb.inv_freq, frequencies)
    assert torch.equal(logits(loaded, IDS), logits(tiny("gravity").to(dtype), IDS))


def test_generating_in_half_precision_goes_through_both_caches() -> None:
    model = tiny("blocks").bfloat16()
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    dynamic = model.generate(IDS[:, :16], **options)
    static = {"cache_implementation": "static", "disable_compile": True}
    assert dynamic.shape == model.generate(IDS[:, :16], **options, **static).shape == (2, 22)
