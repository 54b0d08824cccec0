"""Squared distances between positions, and the inverse of the softened, curved distance.

One table of `R = 1 / D` serves every head and every layer that stands in the same space.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
from torch import Tensor

from ..ops.reference import compute_dtype

# A Gram matrix knows `|p - q|^2` to a few roundings of `|p|^2 + |q|^2`; below this many, what it
# says is noise, and the two positions count as one.
_ROUNDINGS = 8
# Of so few coordinates the differences themselves are the fastest exact way.
_FEW_COORDINATES = 4


def squared_distances(queries: Tensor, keys: Tensor, *, exact: bool = False) -> Tensor:
    """`|q_i - k_j|^2` by a Gram matrix of centred positions: no `[Tq, Tk, P]` tensor.

    Exactly 0, gradient included, for equal rows, and for rows that are closer than the arithmetic
    can tell: `|q - k|^2 < 8 eps (|q|^2 + |k|^2)`, about 0.1 % of their length in float32.

    Args:
        queries: `[..., Tq, P]`.
        keys: `[..., Tk, P]`, leading dimensions as those of `queries`.
        exact: as precise as differences, also where neighbours lie much closer than the whole set
            is wide: by float64, at up to twice the time. Not needed for positions that are spread
            evenly, such as a model's own.

    Returns:
        `[..., Tq, Tk]`, float64 for float64 positions and float32 for all others.
    """
    if queries.dim() < 2 or keys.dim() < 2 or queries.shape[-1] != keys.shape[-1]:
        raise ValueError(
            f"squared_distances: expected queries [..., Tq, P] and keys [..., Tk, P], got "
            f"{tuple(queries.shape)} and {tuple(keys.shape)}. Give both the same width P"
        )
    dtype = compute_dtype(queries.dtype)
    if exact:
        return _exact(queries, keys, dtype)
    # Under autocast the product would be rounded to half precision, and distances to nothing.
    device = queries.device.type
    with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
        same = keys is queries
        centre = keys.to(dtype).mean(-2, keepdim=True)
        keys = keys.to(dtype) - centre
        queries = keys if same else queries.to(dtype) - centre
        lengths = queries.square().sum(-1).unsqueeze(-1) + keys.square().sum(-1).unsqueeze(-2)
        squared = lengths - 2.0 * (queries @ keys.transpose(-2, -1))
        resolved = squared > _ROUNDINGS * torch.finfo(dtype).eps * lengths
        return torch.where(resolved, squared, 0.0)


def _exact(queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
    # MPS has no float64.
    if 0 < queries.shape[-1] <= _FEW_COORDINATES or queries.device.type == "mps":
        columns = zip(queries.to(dtype).unbind(-1), keys.to(dtype).unbind(-1), strict=True)
        squares = [(q.unsqueeze(-1) - k.unsqueeze(-2)).square() for q, k in columns]
        return sum(squares[1:], start=squares[0])
    same = keys is queries
    keys = keys.double()
    return squared_distances(keys if same else queries.double(), keys).to(dtype)


def inverse_distance(
    squared: Tensor, *, curvature: float, event_horizon: float, softening: float = 0.0
) -> Tensor:
    """`R = 1 / (D + softening)` with the curved distance `D` of squared distances `s`.

    `D = max(s (1 + curvature cos sqrt(s + event_horizon)), event_horizon)`, and without curvature
    `D = s + event_horizon`. At `softening = 0` this is the law of the published Lightweight
    Gravitational Transformer, in which a token's own force is some thousand times that of any other
    and attention the identity; a softening of 0.2 makes it a working one.

    Args:
        squared: `s` `[...]`, not negative.
        curvature: of the space; at 1 or more distances may shrink to the horizon far away.
        event_horizon: the least `D`, in units of squared distance.
        softening: added to `D`, in units of squared distance.

    Returns:
        `[...]`, dtype of `squared`.
    """
    check_space(curvature, event_horizon, softening)
    if curvature == 0.0:
        return (squared + (event_horizon + softening)).reciprocal()
    # Without a horizon the root has no derivative where two positions meet.
    root = (squared + event_horizon).clamp(min=torch.finfo(squared.dtype).tiny).sqrt()
    curved = (squared * (1.0 + curvature * root.cos())).clamp(min=event_horizon)
    return (curved + softening).reciprocal()


def check_space(curvature: float, event_horizon: float, softening: float) -> None:
    """ValueError for constants of space that give no finite `1 / D`."""
    if not math.isfinite(curvature):
        raise ValueError(f"curvature: expected a finite number, got {curvature!r}. 0 is flat")
    for name, value in (("event_horizon", event_horizon), ("softening", softening)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(
                f"{name}: expected a finite number >= 0 (squared distance), got {value!r}"
            )
    if event_horizon + softening == 0:
        raise ValueError(
            "event_horizon, softening: expected at least one above 0, got 0 and 0, under which a "
            "token's force on itself is infinite. The published values are 1e-6 and 0"
        )
