"""Dense attention with the selection as its mask: where few pairs would be saved, and for gradients
on a GPU, whose kernels of dense attention have them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from ..blocks import ranges
from ..reference import compute_dtype
from .dense import masked_attention
from .scores import Gravity, Score
from .selecting import Selection

# Pairs of all heads whose masks are held at a time.
_PAIRS = {"cpu": 2**23, "gpu": 2**28}


def selection_masked_attention(
    q: Tensor, k: Tensor, v: Tensor, score: Score, selection: Selection, dropout_p: float = 0.0
) -> Tensor:
    """Shapes as in `sparse_attention`. For a gradient each part of the queries is computed once
    more, so that the masks of one part are all that is held, then too."""
    batch, heads, queries, _ = q.shape
    kind = "cpu" if q.device.type == "cpu" else "gpu"
    step = max(1, _PAIRS[kind] // max(1, batch * heads * k.shape[2]))
    if step >= queries:
        return _attend(q, k, v, score, selection, dropout_p)
    again = not torch.compiler.is_compiling() and needs_gradient(q, k, v, score)
    parts = []
    for rows in ranges(queries, step):
        call = (q[:, :, rows], k, v, score, selection.rows(rows), dropout_p)
        parts.append(checkpoint(_attend, *call, use_reentrant=False) if again else _attend(*call))
    return torch.cat(parts, 2)


def needs_gradient(q: Tensor, k: Tensor, v: Tensor, score: Score) -> bool:
    """Whether a call is part of a graph of autograd."""
    return torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *score.tensors))


def _attend(
    q: Tensor, k: Tensor, v: Tensor, score: Score, selection: Selection, dropout_p: float
) -> Tensor:
    mask = selection.mask().repeat_interleave(q.shape[1] // k.shape[1], 1)
    bias = selection.visible.bias
    if isinstance(score, Gravity) and q.device.type == "cpu":
        mask = _far(mask, selection, compute_dtype(q.dtype))
    elif bias is not None:
        mask = bias.masked_fill(~mask, torch.finfo(bias.dtype).min)
    return masked_attention(q, k, v, score, mask, dropout_p)


def _far(mask: Tensor, selection: Selection, dtype: torch.dtype) -> Tensor:
    """The additive mask that hides what is not visible, and puts what is not selected so far away
    that it weighs nothing. Gravity on a CPU skips keys that it is told are hidden from all of a
    block of queries; which of them those are may not depend on what the later ones chose, as sums
    over more zeros are rounded otherwise."""
    lowest, seen = torch.finfo(dtype).min, selection.visible
    far = torch.zeros((), dtype=dtype) if seen.bias is None else seen.bias.to(dtype)
    return far.masked_fill(~mask, lowest / 4).masked_fill(~seen.mask(), lowest)
