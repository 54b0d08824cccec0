"""The definition of gravity attention. Every other implementation is compared with this file."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class AttentionOutput(NamedTuple):
    """`output` `[B, H, Tq, Dv]` in the dtype of `v`; `weights` `[B, H, Tq, Tk]` in float32 or
    float64."""

    output: Tensor
    weights: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Scores are computed in float64 for float64 inputs and in float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def squared_distance(q: Tensor, k: Tensor, key_radius_sq: Tensor | None = None) -> Tensor:
    """`max(|q_i|^2 + kappa_j - 2 q_i.k_j, 0)`: `[B, H, Tq, Tk]`, one key head per query head.

    `kappa_j` is `|k_j|^2`, or with lifted keys the head's `key_radius_sq` `[H]`: every key then has
    one more coordinate, `sqrt(R^2 - |k|^2)`, in which queries are 0 (Bachrach et al., RecSys 2014).
    """
    query_sq = q.square().sum(-1, keepdim=True)
    if key_radius_sq is None:
        kappa = k.square().sum(-1).unsqueeze(-2)
    else:
        kappa = key_radius_sq[:, None, None]
    return (query_sq + kappa - 2.0 * q @ k.transpose(-2, -1)).clamp(min=0.0)


def gravity_score(
    distance_sq: Tensor,
    mass: Tensor,
    eps: Tensor,
    law: str,
    query_mass: Tensor | None = None,
    key_mass: Tensor | None = None,
) -> Tensor:
    """The score before softmax, from squared distances `[B, H, Tq, Tk]` and per-head `[H]` terms.

    `"force"`: `M^2 a_i b_j / (d^2 + eps)`; `"power"`: `-M^2 ln(d^2 + eps) + ln b_j`.
    """
    strength = mass.square()[:, None, None]
    softened = distance_sq + eps[:, None, None]
    if law == "power":
        score = -strength * softened.log()
        return score if key_mass is None else score + key_mass.log().unsqueeze(-2)
    score = strength / softened
    if query_mass is not None:
        score = score * query_mass.unsqueeze(-1)
    return score if key_mass is None else score * key_mass.unsqueeze(-2)


def split_mask(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """A mask as `(allowed, bias)`: bool = attend; float = added to the score, and entries at or
    below half the dtype's lowest value (what transformers calls masked, and -inf) are hidden."""
    if mask.dtype == torch.bool:
        return mask, None
    return mask > torch.finfo(mask.dtype).min / 2, mask


def causal_mask(queries: int, keys: int, device: torch.device | None = None) -> Tensor:
    """Bool `[Tq, Tk]`, aligned at the ends: row i sees keys `j <= i + Tk - Tq`."""
    rows = torch.arange(queries, device=device)[:, None] + (keys - queries)
    return torch.arange(keys, device=device)[None, :] <= rows


def gravity_attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mass: Tensor,
    *,
    eps: Tensor,
    law: str = "force",
    key_radius_sq: Tensor | None = None,
    query_mass: Tensor | None = None,
    key_mass: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    dropout_p: float = 0.0,
) -> AttentionOutput:
    """Softmax over gravity scores, written straight from the law; memory grows with `Tq * Tk`.

    Shapes and meanings as in `gravity_hf.ops.api.gravity_attention`. A row that may attend to no
    key gives zeros.
    """
    dtype = compute_dtype(q.dtype)
    out_dtype = v.dtype
    groups = q.shape[1] // k.shape[1]
    q, k, v, mass, eps = (x.to(dtype) for x in (q, k, v, mass, eps))
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if key_radius_sq is not None:
        key_radius_sq = key_radius_sq.to(dtype).repeat_interleave(groups)
    if query_mass is not None:
        query_mass = query_mass.to(dtype)
    if key_mass is not None:
        key_mass = key_mass.to(dtype)

    # Under autocast a product would be rounded to half precision, whatever its operands are.
    with torch.autocast(q.device.type, enabled=False):
        distance_sq = squared_distance(q, k, key_radius_sq)
        score = gravity_score(distance_sq, mass, eps, law, query_mass, key_mass)
        allowed = None
        if mask is not None:
            allowed, bias = split_mask(mask)
            if bias is not None:
                score = score + bias.masked_fill(~allowed, 0.0).to(dtype)
        if causal:
            triangle = causal_mask(q.shape[2], k.shape[2], q.device)
            allowed = triangle if allowed is None else allowed & triangle
        if allowed is None:
            weights = score.softmax(-1)
        else:
            lowest = torch.finfo(dtype).min
            weights = score.masked_fill(~allowed, lowest).softmax(-1)
            weights = weights * allowed.any(-1, keepdim=True)
        weights = torch.nn.functional.dropout(weights, dropout_p)
        return AttentionOutput((weights @ v).to(out_dtype), weights)
