"""Each query with its own keys, gathered: for few queries, and long caches that are not read."""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocks import ranges
from ..reference import compute_dtype
from .products import exact
from .reference import masked_softmax
from .scores import Score, squared_lengths
from .selecting import Selection

# Elements of gathered keys held at a time.
_ELEMENTS = {"cpu": 2**20, "gpu": 2**26}


def gathered_attention(
    q: Tensor, k: Tensor, v: Tensor, score: Score, selection: Selection, dropout_p: float = 0.0
) -> Tensor:
    """Shapes as in `sparse_attention`."""
    batch, key_heads, queries, _ = selection.blocks.shape
    budget = selection.budget
    keys = budget.sinks + budget.window + selection.blocks.shape[3] * budget.block_size
    kind = "cpu" if q.device.type == "cpu" else "gpu"
    step = max(1, _ELEMENTS[kind] // max(1, batch * key_heads * keys * k.shape[3]))
    if step >= queries:
        return _gathered(q, k, v, score, selection, dropout_p)
    parts = [
        _gathered(q[:, :, rows], k, v, score, selection.rows(rows), dropout_p)
        for rows in ranges(queries, step)
    ]
    return torch.cat(parts, 2)


def _gathered(
    q: Tensor, k: Tensor, v: Tensor, score: Score, selection: Selection, dropout_p: float
) -> Tensor:
    key_heads, dtype = k.shape[1], compute_dtype(q.dtype)
    index, meant = selection.indices()
    rows = _flat(index, k.shape[2])
    # [B, G, Tq, S, D]
    keys, values = (_take(x, rows, index.shape).to(dtype) for x in (k, v))
    # [B, G, Tq, H / G, D]
    query = q.unflatten(1, (key_heads, -1)).transpose(2, 3).to(dtype)
    with exact(q.device):
        product = query @ keys.mT
    query_sq, key_sq = squared_lengths(score, query), squared_lengths(score, keys)
    scores = score.scores(
        product,
        None if query_sq is None else query_sq.unsqueeze(-1),
        None if key_sq is None else key_sq.unsqueeze(-2),
        lambda x: x.view(1, key_heads, 1, -1, 1),
    )
    bias = selection.visible.bias_at(index)
    if bias is not None:
        scores = scores + bias.to(dtype).unsqueeze(-2)
    weights = masked_softmax(scores, meant.unsqueeze(-2))
    weights = torch.nn.functional.dropout(weights, dropout_p)
    with exact(q.device):
        output = weights @ values
    return output.transpose(2, 3).flatten(1, 2).to(v.dtype)


def _flat(index: Tensor, keys: int) -> Tensor:
    """Of keys `[B, G, Tq, S]` the rows in `[B * G * Tk, D]`."""
    heads = torch.arange(index.shape[0] * index.shape[1], device=index.device) * keys
    return (index + heads.view(*index.shape[:2], 1, 1)).flatten()


def _take(x: Tensor, rows: Tensor, shape: torch.Size) -> Tensor:
    return x.flatten(0, 2).index_select(0, rows).view(*shape, x.shape[3])
