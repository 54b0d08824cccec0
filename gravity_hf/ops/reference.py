"""The definition of gravity attention. Every other implementation is compared with this file."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .curvature import Curvature
from .cutoff import Cutoff

# The score of a query's own key under `exclude_self`: no weight beside any other key that it sees,
# yet above what is hidden, so that a query which sees nothing else keeps itself.
SELF_SCORE = -1e30


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
    *,
    log_key_mass: Tensor | None = None,
    head_bias: Tensor | None = None,
    repulsive: bool = False,
    cutoff: Cutoff | None = None,
    curvature: Curvature | None = None,
    max_force: float | None = None,
    force_cap: str = "clamp",
) -> Tensor:
    """The score before softmax, from squared distances `[B, H, Tq, Tk]` and per-head `[H]` terms.

    `"force"`: `(+-M^2 / (d^2 + eps) + beta) a_i b_j`, at most `max_force`; `"power"`:
    `-M^2 ln(d^2 + eps) + ln b_j`; then the cutoff's term. A curvature's distance takes the place of
    `d^2`. What a hard cutoff hides is not hidden here: that is `cutoff.hidden(distance_sq)`.
    """
    distance = distance_sq if curvature is None else curvature.distance(distance_sq)
    softened = distance + eps[:, None, None]
    if law == "power":
        score = power_score(-softened.log(), mass, key_mass, log_key_mass)
    else:
        strength = mass.square()[:, None, None]
        base = (-strength if repulsive else strength) / softened
        score = force_score(base, query_mass, key_mass, head_bias, max_force, force_cap)
    return score if cutoff is None else cutoff.apply(score, distance_sq)


def force_score(
    base: Tensor,
    query_mass: Tensor | None,
    key_mass: Tensor | None,
    head_bias: Tensor | None,
    max_force: float | None,
    force_cap: str = "clamp",
) -> Tensor:
    """`min((base_ij + beta) a_i b_j, max_force)`, `base` `[B, H, Tq, Tk]`; with `force_cap`
    `"tanh"` it is `c tanh(... / c)`, `c` the `max_force`."""
    score = base
    if head_bias is not None:
        score = score + head_bias[:, None, None]
    if query_mass is not None:
        score = score * query_mass.unsqueeze(-1)
    if key_mass is not None:
        score = score * key_mass.unsqueeze(-2)
    if max_force is None:
        return score
    if force_cap == "tanh":
        return max_force * torch.tanh(score / max_force)
    return score.clamp(max=max_force)


def power_score(
    log_inverse: Tensor,
    mass: Tensor,
    key_mass: Tensor | None,
    log_key_mass: Tensor | None = None,
) -> Tensor:
    """`M^2 ln r_ij + ln b_j`, `r = 1 / (d^2 + eps)`; `log_inverse` is `ln r` `[B, H, Tq, Tk]`."""
    score = mass.square()[:, None, None] * log_inverse
    if log_key_mass is None and key_mass is not None:
        log_key_mass = key_mass.log()
    return score if log_key_mass is None else score + log_key_mass.unsqueeze(-2)


def neutral_distance(q: Tensor, k: Tensor, key_radius_sq: Tensor | None = None) -> Tensor:
    """`|q_i|^2 + kappa_j`: `squared_distance` as it would be at a right angle, `q_i.k_j = 0`.

    `[B, H, Tq, Tk]`, or `[B, H, Tq, 1]` with lifted keys, whose `kappa` is the same for all.
    """
    query_sq = q.square().sum(-1, keepdim=True)
    if key_radius_sq is None:
        return query_sq + k.square().sum(-1).unsqueeze(-2)
    return query_sq + key_radius_sq[:, None, None]


def soft_capped(score: Tensor, neutral: Tensor, softcap: float) -> Tensor:
    """`n + c tanh((score - n) / c)`, `n` the neutral score.

    A host caps `scaling q.k`, which is 0 at a right angle. A score of gravity has a constant part,
    which softmax does not see and tanh would; the cap is of what differs from it.
    """
    return neutral + softcap * torch.tanh((score - neutral) / softcap)


def split_mask(mask: Tensor) -> tuple[Tensor, Tensor | None]:
    """A mask as `(allowed, bias)`: bool = attend; float = added to the score, and entries at or
    below half the dtype's lowest value (what transformers calls masked, and -inf) are hidden."""
    if mask.dtype == torch.bool:
        return mask, None
    return mask > torch.finfo(mask.dtype).min / 2, mask


def visible_keys(
    queries: int,
    keys: int,
    *,
    causal: bool = False,
    window: int | None = None,
    key_ranges: Tensor | None = None,
    device: torch.device | None = None,
) -> Tensor | None:
    """Bool `[B|1, 1, Tq, Tk]`: what positions alone let a query see; None: every key.

    Query i stands at `p = i + Tk - Tq`, so the ends of queries and keys meet.
    """
    if not causal and window is None and key_ranges is None:
        return None
    key = torch.arange(keys, device=device)
    ahead = key - (torch.arange(queries, device=device)[:, None] + (keys - queries))
    visible = torch.ones_like(ahead, dtype=torch.bool)
    if causal:
        visible = visible & (ahead <= 0)
    if window is not None:
        visible = visible & ((ahead if causal else ahead.abs()) < window) & (ahead > -window)
    visible = visible[None, None]
    if key_ranges is not None:
        start, stop = key_ranges[:, None].unsqueeze(-2).unbind(-1)
        visible = visible & (key >= start) & (key < stop)
    return visible


def own_position(queries: int, keys: int, device: torch.device | None = None) -> Tensor:
    """Bool `[Tq, Tk]`: the key at the query's own position, `j == i + Tk - Tq`."""
    position = torch.arange(queries, device=device)[:, None] + (keys - queries)
    return torch.arange(keys, device=device) == position


def gravity_attention_reference(
    q: Tensor | None,
    k: Tensor | None,
    v: Tensor,
    mass: Tensor,
    *,
    eps: Tensor | None,
    law: str = "force",
    key_radius_sq: Tensor | None = None,
    query_mass: Tensor | None = None,
    key_mass: Tensor | None = None,
    log_key_mass: Tensor | None = None,
    head_bias: Tensor | None = None,
    repulsive: bool = False,
    cutoff: Cutoff | None = None,
    curvature: Curvature | None = None,
    max_force: float | None = None,
    force_cap: str = "clamp",
    inverse_distance: Tensor | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    key_ranges: Tensor | None = None,
    exclude_self: bool = False,
    dropout_p: float = 0.0,
) -> AttentionOutput:
    """Softmax over gravity scores, written straight from the law; memory grows with `Tq * Tk`.

    Shapes and meanings as in `gravity_hf.ops.api.gravity_attention`. A row that may attend to no
    key gives zeros.
    """
    dtype = compute_dtype(v.dtype)
    out_dtype = v.dtype
    groups = mass.shape[0] // v.shape[1]
    tensors = (q, k, v, mass, eps, key_radius_sq, query_mass, key_mass, head_bias)
    q, k, v, mass, eps, key_radius_sq, query_mass, key_mass, head_bias, inverse_distance, sinks = (
        None if x is None else x.to(dtype) for x in (*tensors, inverse_distance, sinks)
    )
    log_key_mass = None if log_key_mass is None else log_key_mass.to(dtype)
    v = v.repeat_interleave(groups, 1)

    # Under autocast a product would be rounded to half precision, whatever its operands are.
    with torch.autocast(v.device.type, enabled=False):
        hidden = None
        if inverse_distance is not None:
            table = inverse_distance.expand(*v.shape[:2], *inverse_distance.shape[-2:])
            if law == "power":
                score = power_score(table.log(), mass, key_mass, log_key_mass)
            else:
                strength = mass.square()[:, None, None]
                base = (-strength if repulsive else strength) * table
                score = force_score(base, query_mass, key_mass, head_bias, max_force, force_cap)
        else:
            if key_radius_sq is not None:
                key_radius_sq = key_radius_sq.repeat_interleave(groups)
            k = k.repeat_interleave(groups, 1)
            distance_sq = squared_distance(q, k, key_radius_sq)
            score = gravity_score(
                distance_sq,
                mass,
                eps,
                law,
                query_mass,
                key_mass,
                log_key_mass=log_key_mass,
                head_bias=head_bias,
                repulsive=repulsive,
                cutoff=cutoff,
                curvature=curvature,
                max_force=max_force,
                force_cap=force_cap,
            )
            hidden = None if cutoff is None else cutoff.hidden(distance_sq)
            if softcap is not None:
                neutral_sq = neutral_distance(q, k, key_radius_sq)
                score = soft_capped(score, gravity_score(neutral_sq, mass, eps, law), softcap)
        queries, keys = score.shape[-2:]
        allowed = visible_keys(
            queries, keys, causal=causal, window=window, key_ranges=key_ranges, device=v.device
        )
        if hidden is not None:
            allowed = ~hidden if allowed is None else allowed & ~hidden
        if mask is not None:
            attend, bias = split_mask(mask)
            if bias is not None:
                score = score + bias.masked_fill(~attend, 0.0).to(dtype)
            allowed = attend if allowed is None else allowed & attend
        if exclude_self:
            score = score.masked_fill(own_position(queries, keys, v.device), SELF_SCORE)
        if allowed is not None:
            score = score.masked_fill(~allowed, torch.finfo(dtype).min)
        if sinks is not None:
            # One more key, at the origin. Its value is zero: only the sum of weights knows of it.
            origin_sq = squared_distance(q, torch.zeros_like(k[:, :, :1]), key_radius_sq)
            sink_score = gravity_score(origin_sq, mass, eps, law)
            sink_score = sink_score + (sinks[:, None] if sinks.dim() == 1 else sinks).unsqueeze(-1)
            score = torch.cat([score, sink_score], -1)
        weights = score.softmax(-1)[..., :keys]
        if allowed is not None:
            weights = weights * allowed.any(-1, keepdim=True)
        weights = torch.nn.functional.dropout(weights, dropout_p)
        return AttentionOutput((weights @ v).to(out_dtype), weights)
