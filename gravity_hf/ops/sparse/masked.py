"""Dense attention with the selection as its mask: where few pairs would be saved."""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import ranges
from .dense import masked_attention
from .scores import Score
from .selecting import Selection

# Pairs of all heads whose masks are held at a time.
_PAIRS = {"cpu": 2**23, "gpu": 2**28}


def selection_masked_attention(
    q: Tensor, k: Tensor, v: Tensor, score: Score, selection: Selection, dropout_p: float = 0.0
) -> Tensor:
    """Shapes as in `sparse_attention`."""
    batch, heads, queries, _ = q.shape
    kind = "cpu" if q.device.type == "cpu" else "gpu"
    step = max(1, _PAIRS[kind] // max(1, batch * heads * k.shape[2]))
    parts = []
    for rows in ranges(queries, step):
        part = selection.rows(rows)
        mask = part.mask().repeat_interleave(heads // k.shape[1], 1)
        bias = part.visible.bias
        if bias is not None:
            mask = bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
        parts.append(masked_attention(q[:, :, rows], k, v, score, mask, dropout_p))
    return parts[0] if len(parts) == 1 else torch.cat(parts, 2)
