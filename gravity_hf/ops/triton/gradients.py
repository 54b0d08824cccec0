"""What the backward kernels share: weights again, and from dL/dweight to dL/d(squared distance).

`c = dL/dscore = w (G_o.v - delta)` with `delta = G_o.o`. Where a gradient is a difference
`sum g (q - k)`, its two sums use the same rounded `g`, so that what rounding adds is proportional
to `q - k`. Formulas: ../README.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .forward import squared_norms
from .problem import Problem, aligned
from .score import (
    LN2,
    LOG2E,
    curved,
    curved_slope,
    general_gradients,
    general_scores,
    plain_scores,
    power_of_two,
    reciprocal,
    told_apart,
)
from .visible import (
    load_mask,
    visible_pairs,
)


# fmt: off
@triton.jit
def narrow(x, like: tl.constexpr, SCALED: tl.constexpr):
    """A tile as operand of a product, and the factor to take out again. float16 has too little
    range for gradients of scores: its tiles are scaled by a power of two to a largest element
    between 2^3 and 2^4."""
    if SCALED:
        largest = tl.max(tl.max(tl.abs(x), 1), 0)
        exponent = tl.where(largest > 0, tl.floor(tl.log2(tl.maximum(largest, 1e-30))), 0.0)
        scale = tl.exp2(3.0 - exponent)
        return (x * scale).to(like), 1.0 / scale
    else:
        return x.to(like), 1.0


@triton.jit
def pair_gradients(
    c, weight, grad_weight, score, softened, bend, eps, floor, strength, a, b, bias, radius_sq,
    width, ceiling, kappa, horizon, LAW: tl.constexpr, PLAIN: tl.constexpr, LIFTED: tl.constexpr,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, HAS_BIAS: tl.constexpr, REPULSIVE: tl.constexpr,
    CAP: tl.constexpr, CURVED: tl.constexpr, CUTOFF: tl.constexpr, NATIVE: tl.constexpr,
):
    """dL/d(squared distance) of every pair from dL/dscore, `c = weight * grad_weight`, where
    `grad_weight` is dL/dweight - delta (plain laws read only `c`); of the plain laws without the
    factor of `plain_factor`. Clamped distances get none; `bend` is the slope of a curved one. Then
    what the sums over rows and columns need: dL/d(softened distance); the slope `dscore/dn` of the
    plain laws, without factor, or `w dscore/dn`; and by strength, a, b, bias and radius^2, of which
    plain laws have none (they return `c`), `w dscore/d...`: times `grad_weight` these are the
    gradients, and alone their sum over a row is what its mean is."""
    if PLAIN:
        if LAW == "power":
            slope = reciprocal(softened, NATIVE)
        else:
            slope = score * score
        g = c * slope
        distance = g
        if LIFTED:
            distance = tl.where(softened > floor, g, 0.0)
        return distance, g, slope, c, c, c, c, c
    else:
        slope, d_cutoff, d_strength, d_a, d_b, d_bias, d_radius = general_gradients(
            weight, softened, eps, strength, a, b, bias, radius_sq, width, ceiling, LAW, HAS_A,
            HAS_B, HAS_BIAS, REPULSIVE, CAP, CUTOFF, NATIVE,
        )
        g = slope * grad_weight
        distance = g
        if CUTOFF != "none":
            distance += d_cutoff * grad_weight
        if CURVED:
            distance = distance * bend
        elif LAW != "table":
            distance = tl.where(softened > floor, distance, 0.0)
        return distance, g, slope, d_strength, d_a, d_b, d_bias, d_radius


@triton.jit
def plain_factor(strength, unit, POWER: tl.constexpr):
    """What turns `c s^2` (force, s in units of log2 e) or `c / (n / unit)` (power) into
    dL/d(squared distance): `-c M^2 / n^2 = -c s^2 ln 2 / unit`, and `-c M^2 / n`."""
    if POWER:
        return -strength / unit
    else:
        return -LN2 / unit


@triton.jit
def weights_again(
    inner, term, lse, rest, rows, columns, ranged, start, stop, batch, head, slope, floor, eps,
    strength, a, b, bias, radius_sq, width, ceiling, kappa, horizon, shift, window, queries, keys,
    mask, mask_b, mask_h, mask_row, mask_column, mask_lowest, LAW: tl.constexpr,
    PLAIN: tl.constexpr, LIFTED: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr,
    HAS_BIAS: tl.constexpr, REPULSIVE: tl.constexpr, CAP: tl.constexpr, CURVED: tl.constexpr,
    CUTOFF: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, RANGES: tl.constexpr,
    MASK: tl.constexpr, EXCLUDE_SELF: tl.constexpr, MASKED: tl.constexpr, NATIVE: tl.constexpr,
    EXACT: tl.constexpr,
):
    """A tile of softened distances, scores and softmax weights from q.k (law "table": from inverse
    distances), and the slope of a curved distance, `bend`. Works in both orientations: per-query
    and per-key arguments broadcast.

    A query's own key, where excluded, has weight 0 here, also where it is all that the query sees:
    its score is a constant."""
    bend = 1.0
    if LAW == "table":
        softened = inner
    else:
        softened = inner * slope + term
        softened = tl.maximum(softened, floor, propagate_nan=tl.PropagateNan.ALL)
        if not PLAIN and not LIFTED and not CURVED:
            softened = told_apart(softened, floor, term)
        if CURVED:
            bend = curved_slope(softened, kappa, horizon, NATIVE)
            softened = curved(softened, kappa, horizon, NATIVE) + eps
    if PLAIN:
        score = plain_scores(softened, strength, LAW == "power", NATIVE)
        shown = score
        if HAS_B:
            shown += b
    else:
        score = general_scores(
            softened, eps, strength, a, b, bias, radius_sq, width, ceiling, LAW, HAS_A, HAS_B,
            HAS_BIAS, REPULSIVE, CAP, CUTOFF, NATIVE,
        )
        shown = score
    if MASKED:
        seen = visible_pairs(
            rows, columns, ranged, start, stop, shift, window, keys, CAUSAL, WINDOW, RANGES
        )
        if MASK != "none":
            seen, added = load_mask(
                mask, batch, head, rows, columns, seen, queries, keys, mask_b, mask_h, mask_row,
                mask_column, mask_lowest, MASK,
            )
            if MASK == "float":
                shown += added * LOG2E
        if EXCLUDE_SELF:
            seen &= columns != rows + shift
    exponent = shown - lse
    if EXACT:
        exponent += rest
    if REPULSIVE:
        # Where a query sees near keys alone, a pair that these kernels tell apart and the forward
        # pass did not has a score thousands above all that it summed.
        exponent = tl.minimum(exponent, 0.0, propagate_nan=tl.PropagateNan.ALL)
    weight = power_of_two(exponent, NATIVE)
    if MASKED:
        weight = tl.where(seen, weight, 0.0)
    if CUTOFF == "hard":
        weight = tl.where(softened - eps > radius_sq, 0.0, weight)
    return softened, score, weight, bend


# fmt: on


class Inputs(NamedTuple):
    """What all backward kernels read; q, k, v and grad aligned for the copy engine. `delta` is
    filled by the one for queries. `norms` of keys that are not lifted."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor
    grad: Tensor
    saved: Tensor
    delta: Tensor
    norms: Tensor | None


def gather_inputs(
    problem: Problem, saved: Tensor, grad: Tensor, norms: Tensor | None = None
) -> Inputs:
    """`saved`, and `norms` where they are still there: see `forward.forward`."""
    q = k = None
    if problem.q is not None:
        q, k = problem.queries_and_keys()
        if problem.key_radius_sq is not None:
            norms = None
        elif norms is None:
            norms = squared_norms(k, problem.form)
    delta = torch.empty(saved.shape[1:], dtype=torch.float32, device=saved.device)
    return Inputs(q, k, aligned(problem.v), aligned(grad), saved, delta, norms)


def exact(problem: Problem) -> bool:
    """Whether the weights are wanted as exactly as float32 has them: in half precision they are
    rounded to 8 or 11 bits afterwards."""
    return problem.v.dtype == torch.float32
