"""The definition of sparse attention: a softmax over the selected keys, in memory `Tq * Tk`."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import compute_dtype
from .products import exact
from .scores import Score, squared_lengths
from .selecting import Selection


def reference_attention(
    q: Tensor, k: Tensor, v: Tensor, score: Score, selection: Selection, dropout_p: float = 0.0
) -> Tensor:
    """Shapes as in `sparse_attention`. Arithmetic in float32, float64 for float64 inputs."""
    weights = selected_weights(q, k, score, selection.mask(), selection.visible.bias)
    weights = torch.nn.functional.dropout(weights, dropout_p)
    with exact(v.device):
        output = weights.flatten(2, 3) @ v.to(weights.dtype)
    return output.unflatten(2, weights.shape[2:4]).flatten(1, 2).to(v.dtype)


def selected_weights(
    q: Tensor, k: Tensor, score: Score, selected: Tensor, bias: Tensor | None
) -> Tensor:
    """`[B, G, H / G, Tq, Tk]`, zeros where nothing is selected. selected: bool `[B, G|1, Tq, Tk]`.
    bias: added to scores, `[B|1, 1, Tq|1, Tk]`."""
    dtype, key_heads = compute_dtype(q.dtype), k.shape[1]
    q, k = q.to(dtype).unflatten(1, (key_heads, -1)), k.to(dtype)
    with exact(q.device):
        product = (q.flatten(2, 3) @ k.mT).unflatten(2, q.shape[2:4])
    query_sq, key_sq = squared_lengths(score, q), squared_lengths(score, k)
    scores = score.scores(
        product,
        None if query_sq is None else query_sq.unsqueeze(-1),
        None if key_sq is None else key_sq[:, :, None, None],
        lambda x: x.view(1, key_heads, -1, 1, 1),
    )
    if bias is not None:
        scores = scores + bias.to(dtype).unsqueeze(1)
    return masked_softmax(scores, selected.unsqueeze(2))


def masked_softmax(scores: Tensor, meant: Tensor) -> Tensor:
    """Over the last dimension, of what is meant; zeros where nothing is."""
    scores = scores.masked_fill(~meant, torch.finfo(scores.dtype).min)
    return scores.softmax(-1).masked_fill(~meant.any(-1, keepdim=True), 0.0)
