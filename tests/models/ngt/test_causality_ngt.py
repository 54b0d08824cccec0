"""A later token never changes an earlier logit: not in any precision, not by a single bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gravity_hf.models.ngt import NGTForCausalLM

from .every_case import EVERY, any_model
from .ngt_cases import IDS, VOCABULARY, padded

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# The first token, which others know where it sees no other; and a token among many.
CHANGED = (1, 6)


def logits(model: NGTForCausalLM, ids: Tensor, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **inputs).logits


def changed(ids: Tensor, at: int) -> Tensor:
    other = ids.clone()
    other[:, at] = (ids[:, at] + 11) % (VOCABULARY - 1) + 1
    return other


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", EVERY)
def test_later_tokens_never_change_earlier_logits(name: str, dtype: torch.dtype) -> None:
    """In float16 the published code let the future win: where every visible score overflows, the
    hidden ones, which are finite, are the largest."""
    model = any_model(name).to(dtype)
    before = logits(model, IDS)
    assert before.isfinite().all()
    for at in CHANGED:
        after = logits(model, changed(IDS, at))
        assert torch.equal(after[:, :at], before[:, :at])
        assert not torch.equal(after[:, at:], before[:, at:])


@pytest.mark.parametrize("name", ["v2", "reference", "twin, alibi"])
def test_nor_beside_padding(name: str) -> None:
    model = any_model(name).half()
    inputs = padded("left")
    mask, ids = inputs["attention_mask"], inputs["input_ids"]
    before = logits(model, ids, attention_mask=mask)
    after = logits(model, changed(ids, 7), attention_mask=mask)
    assert before.isfinite().all()
    assert torch.equal(after[:, :7], before[:, :7])
