"""The host's own queries and keys, taken from an unpatched model."""

from __future__ import annotations

from typing import Any

from hosts import logits, tiny_host
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

Call = tuple[Tensor, Tensor, Tensor | None]


def collect_heads(family: str, batches: list[dict[str, Tensor]]) -> list[list[Call]]:
    """Per attention module, per batch: q, k `[B, H, T, D]` and the bool mask or None."""
    calls: dict[Any, list[Call]] = {}

    def spy(module, query, key, value, mask, **kwargs):
        groups = query.shape[1] // key.shape[1]
        calls.setdefault(module, []).append((query, key.repeat_interleave(groups, 1), mask))
        return sdpa_attention_forward(module, query, key, value, mask, **kwargs)

    AttentionInterface.register("spy", spy)
    AttentionMaskInterface.register("spy", sdpa_mask)
    model = tiny_host(family)
    model.set_attn_implementation("spy")
    for batch in batches:
        logits(model, batch)
    return list(calls.values())
