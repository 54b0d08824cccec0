"""Texts made into padded batches."""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedTokenizerBase

Batches = list[dict[str, Tensor]]

_TEXTS_AT_ONCE = 16


def padded_batches(tokenizer: PreTrainedTokenizerBase, texts: list[str], length: int) -> Batches:
    """`texts` cut at `length` tokens, padded within each batch."""
    options = {"padding": True, "truncation": True, "max_length": length, "return_tensors": "pt"}
    starts = range(0, len(texts), _TEXTS_AT_ONCE)
    return [dict(tokenizer(texts[i : i + _TEXTS_AT_ONCE], **options)) for i in starts]
