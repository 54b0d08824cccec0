"""Batches of prepared examples, and the loss of a language model on them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ...training.measures import evaluating

_ROWS_AT_ONCE = 4


def batches_of(rows: Any, collator: Any, count: int, *, labels: bool = True) -> list[dict]:
    """Model inputs of the first `count` of `rows`, with labels where there are some.

    Args:
        rows: examples by index.
        collator: makes a batch of several.
        count: at most as many as there are.
        labels: False leaves them out.
    """
    batches = []
    for start in range(0, count, _ROWS_AT_ONCE):
        batch = collator([rows[i] for i in range(start, min(start + _ROWS_AT_ONCE, count))])
        kept = {name: value for name, value in batch.items() if labels or name != "labels"}
        # Without a cache transformers looks for the borders of packed documents.
        batches.append({**kept, "use_cache": False} if "position_ids" in kept else kept)
    return batches


def held_out_loss(model: nn.Module, batches: Sequence[dict[str, Any]]) -> float:
    """Mean next-token loss over every token that has a label, nats."""
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with evaluating(model):
        for batch in batches:
            inputs = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
            loss = model(**{"use_cache": False, **inputs}).loss
            total += loss.item() * measured_tokens(batch)
            count += measured_tokens(batch)
    return total / count


def measured_tokens(batch: dict[str, Any]) -> int:
    """How many predictions of a batch are measured; for encoders, tokens that are read."""
    if "labels" in batch:
        return int((batch["labels"][:, 1:] != -100).sum())
    return int(batch["attention_mask"].sum())
