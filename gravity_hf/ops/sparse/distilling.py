"""Screening learns from dense attention: the loss of a student that sees few dimensions."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import compute_dtype
from .checks import check_visible
from .products import exact
from .reference import selected_weights
from .scores import DotProduct, Score
from .statistics import draw_rows
from .visibility import visibility


def screening_loss(
    q: Tensor,
    k: Tensor,
    screen_q: Tensor,
    screen_k: Tensor,
    score: Score,
    mask: Tensor | None = None,
    rows: int = 64,
    generator: torch.Generator | None = None,
) -> Tensor:
    """`KL(p_t || s_t)` in nats, averaged over key-value heads and `rows` random queries.

    `p_t` are the weights of dense causal attention, averaged over the query heads that share a
    key-value head, without gradient. `s_t` is the softmax over the same keys of the screening
    scores: the law of `score`, applied to the group's mean screening query. What ranks a key high
    in `select_keys` (block_size 1) ranks it high here.

    Args:
        q, k: `[B, H, Tq, D]`, `[B, G, Tk, D]`; screen_q, screen_k likewise, of width `ds`.
        mask: as in `sparse_attention`.
        rows: of one sequence, the same for all of them; drawn with `generator`.

    Returns:
        A scalar, float32 or float64. Queries that see no key count nothing.
    """
    check_visible(q, k.shape[2], mask, None, None)
    seen = visibility(q.shape[2], k.shape[2], mask, None, None, q.device)
    drawn = draw_rows(q.shape[2], rows, generator, q.device)
    if drawn is not None:
        q, screen_q, seen = q[:, :, drawn], screen_q[:, :, drawn], seen.rows(drawn)
    visible, dtype = seen.mask(), compute_dtype(q.dtype)
    with torch.no_grad():
        teacher = selected_weights(q, k, score, visible, seen.bias).mean(2)
    scores = _student(q.detach(), screen_q.to(dtype), screen_k.to(dtype), score)
    scores = scores.masked_fill(~visible, torch.finfo(dtype).min)
    gap = teacher.clamp(min=torch.finfo(dtype).tiny).log() - scores.log_softmax(-1)
    alive = visible.any(-1).expand(*teacher.shape[:3]).to(dtype)
    divergence = torch.where(teacher > 0, teacher * gap, 0.0).sum(-1)
    return (divergence * alive).sum() / alive.sum().clamp(min=1.0)


def _student(q: Tensor, screen_q: Tensor, screen_k: Tensor, score: Score) -> Tensor:
    """`[B, G, rows, Tk]`."""
    key_heads = screen_k.shape[1]
    query = screen_q.unflatten(1, (key_heads, -1)).mean(2)
    with exact(q.device):
        product = query @ screen_k.mT
    if isinstance(score, DotProduct):
        return product * score.scaling

    def mean_of_group(x: Tensor) -> Tensor:
        return x.detach().view(1, key_heads, -1, 1, 1).mean(2)

    if score.key_radius_sq is None:
        query_sq = query.square().sum(-1, keepdim=True)
    else:
        # Lifted keys are ranked by the product alone; lengths are those of the queries themselves.
        query = q.to(product.dtype).unflatten(1, (key_heads, -1)).mean(2)
        query_sq = query.square().sum(-1, keepdim=True)
    key_sq = screen_k.square().sum(-1).unsqueeze(-2)
    return score.scores(product, query_sq, key_sq, mean_of_group)
