"""Several deltas as one of the smallest rank that keeps nearly all of what they do together.

The sum of n updates of rank r has rank n r where they read or write different directions, and then
nothing can be left out: deltas that were made orthogonal, so that they do not disturb each other,
are exactly those that cannot be compressed. What can be saved is what they have in common.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .delta import LowRankDelta
from .errors import ValidationError
from .low_rank import decomposed, summed
from .subspaces import orthonormal, update_spans


class MergedModule(NamedTuple):
    """Of one map.

    Args:
        rank_before: sum of the ranks of the deltas that change it.
        directions: rank of what they read of the input together: what a registry counts.
        rank_sum: rank of their sum, to rounding: what an exact merge needs.
        rank_after: rank that keeps the asked share of the energy.
        energy: share of the squared Frobenius norm of the sum that is kept.
        error: `||sum - merged||_F / ||sum||_F`.
    """

    rank_before: int
    directions: int
    rank_sum: int
    rank_after: int
    energy: float
    error: float


class Merged(NamedTuple):
    """One delta for several, and what it cost at each map."""

    delta: LowRankDelta
    modules: dict[str, MergedModule]


def merged(deltas: Sequence[LowRankDelta], energy: float = 0.99) -> Merged:
    """The best delta of the smallest rank, map by map, that keeps the share `energy` of the squared
    Frobenius norm of the sum (Eckart and Young 1936). Factors of float32 on the CPU.

    Args:
        deltas: at least one, all of linear maps or all of blocks.
        energy: in (0, 1]; 1 keeps the sum, to rounding.

    Raises:
        ValidationError: no deltas, of both kinds, or an energy outside (0, 1].
    """
    if not 0 < energy <= 1:
        raise ValidationError(f"energy: expected a share in (0, 1], got {energy!r}")
    kinds = {type(delta) for delta in deltas}
    if len(kinds) != 1:
        raise ValidationError(
            f"merged: expected deltas of one kind, got {len(deltas)} of {len(kinds)} kinds. Merge "
            "those of linear maps and those of blocks apart"
        )
    factors, modules = {}, {}
    for name in sorted({name for delta in deltas for name in delta.factors}):
        own = [delta.factors[name] for delta in deltas if name in delta.factors]
        own = [(A.cpu().double(), B.cpu().double()) for A, B in own]
        exact = decomposed(*summed(own))
        rank = exact.energy_rank(energy)
        factors[name] = exact.pair(rank)
        squares = exact.values.square()
        total = float(squares.sum())
        left = float(squares[rank:].sum()) / total if total else 0.0
        modules[name] = MergedModule(
            rank_before=sum(len(A) for A, _ in own),
            directions=orthonormal(torch.cat([update_spans(*p).input for p in own], 1)).shape[1],
            rank_sum=len(exact.values),
            rank_after=rank,
            energy=1.0 - left,
            error=math.sqrt(left),
        )
    return Merged(next(iter(kinds))(factors), modules)
