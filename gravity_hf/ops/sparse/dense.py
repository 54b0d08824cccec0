"""Attention to every visible key: what sparse attention is compared with, and turns into where the
budget covers all keys."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..api import gravity_attention
from .scores import DotProduct, Gravity, Score
from .visibility import Visibility, visibility


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    score: Score,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """Causal attention by `scaled_dot_product_attention` or `gravity_attention`; arguments as in
    `sparse_attention`, whose result this is, to the last bit, where its budget covers all keys."""
    queries, keys = q.shape[2], k.shape[2]
    if isinstance(score, Gravity):
        if positions is not None or (mask is not None and mask.dim() != 4):
            mask = _whole_mask(visibility(queries, keys, mask, positions, None, q.device))
        return _gravity(q, k, v, score, mask, dropout_p, causal=True)
    if mask is None and positions is None:
        # Two calls, as a graph of any length has no bool that says which it is.
        if queries <= 1:
            return _dot_product(q, k, v, score, None, dropout_p, causal=False)
        if queries == keys:
            return _dot_product(q, k, v, score, None, dropout_p, causal=True)
    seen = visibility(queries, keys, mask, positions, None, q.device)
    output = _dot_product(q, k, v, score, _whole_mask(seen), dropout_p, causal=False)
    if mask is None and positions is None and queries <= keys:
        return output
    return output.masked_fill((seen.last < 0)[:, None, :, None], 0.0)


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, score: Score, mask: Tensor, dropout_p: float
) -> Tensor:
    """With a bool or additive mask `[B, H, Tq, Tk]` that says all; rows that see nothing give
    zeros."""
    if isinstance(score, Gravity):
        return _gravity(q, k, v, score, mask, dropout_p, causal=False)
    output = _dot_product(q, k, v, score, mask, dropout_p, causal=False)
    seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return output.masked_fill(~seen.any(-1, keepdim=True), 0.0)


def _whole_mask(seen: Visibility) -> Tensor:
    """Bool, or where there is a bias additive: `[B|1, 1, Tq, Tk]`."""
    mask = seen.mask()
    if seen.bias is None:
        return mask
    return seen.bias.masked_fill(~mask, torch.finfo(seen.bias.dtype).min)


def _dot_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: DotProduct,
    mask: Tensor | None,
    dropout_p: float,
    causal: bool,
) -> Tensor:
    if mask is not None and mask.dtype != torch.bool:
        mask = mask.to(q.dtype).clamp(min=torch.finfo(q.dtype).min)
    return F.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=dropout_p,
        is_causal=causal,
        scale=score.scaling,
        enable_gqa=q.shape[1] != k.shape[1],
    )


def _gravity(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Gravity,
    mask: Tensor | None,
    dropout_p: float,
    causal: bool,
) -> Tensor:
    return gravity_attention(
        q,
        k,
        v,
        score.mass,
        eps=score.softening,
        law=score.law,
        key_radius_sq=score.key_radius_sq,
        mask=mask,
        causal=causal,
        dropout_p=dropout_p,
    )
