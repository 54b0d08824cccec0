"""Logits of a text as `generate` would see it: a prompt at once, the rest from a cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..models.placing import CACHE_FIELD
from .measures import evaluating


def read_prompt(model: nn.Module, prompt: Tensor, cache: Any) -> None:
    """Put the keys and values of `prompt` `[B, P]` into an empty cache."""
    with evaluating(model):
        model(input_ids=prompt, use_cache=True, logits_to_keep=1, **{CACHE_FIELD: cache})


def following_logits(model: nn.Module, tokens: Tensor, cache: Any, chunk: int = 1) -> Tensor:
    """Logits `[B, T, V]` in float32 after each of `tokens` `[B, T]`, which follow what the cache
    holds; `chunk` of them are read at once, from the cache as it then is.

    Raises:
        ValueError: a chunk of less than one token.
    """
    if chunk < 1:
        raise ValueError(f"following_logits: chunk: expected at least 1, got {chunk!r}")
    found = []
    with evaluating(model):
        for part in tokens.split(chunk, 1):
            output = model(input_ids=part, use_cache=True, **{CACHE_FIELD: cache})
            found.append(output.logits.float())
    return torch.cat(found, 1)
