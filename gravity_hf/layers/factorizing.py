"""Dense linear maps in two factors, with the least error on the inputs that they really get.

For a weight `W` `[out, in]` and the second moment `C = E[x x^T]` `[in, in]` of its inputs, the map
`W'` of rank r that changes the outputs least is the one with the least

    E |W x - W' x|^2 = tr((W - W') C (W - W')^T) = |(W - W') C^(1/2)|_F^2

By Eckart and Young (1936), applied to `W C^(1/2)`, that is `W' = P P^T W`, where the columns of `P`
`[out, r]` are the leading eigenvectors of `W C W^T`, the second moment of the outputs: no root of
`C` and no inverse is taken, so `C` may be of any rank. Without inputs, `C = I`, it is the truncated
singular value decomposition.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

# Of the mean eigenvalue of C. Directions that no input had keep an order of their own by it.
RIDGE = 1e-6
_ENERGY = "energy:"
FULL = "full"


class Factors(NamedTuple):
    """`down` `[r, in]` and `up` `[out, r]` with `up @ down` the map."""

    down: Tensor
    up: Tensor


class Spectrum(NamedTuple):
    """How the outputs of a map are spread over directions, the strongest first; float64.

    `directions` `[out, m]` orthonormal, `m = min(in, out)`; `energies` `[m]`: the mean square of
    the outputs along each, `>= 0`.
    """

    directions: Tensor
    energies: Tensor

    def kept(self, rank: int) -> float:
        """The share of the energy in the first `rank` directions; 1 of a map that is zero."""
        total = self.energies.sum()
        return float(self.energies[:rank].sum() / total) if total > 0 else 1.0


@dataclass(frozen=True)
class RankRule:
    """How a rank is chosen for each map.

    Exactly one is set, or none: `energy`, the smallest rank that keeps this share of the energy of
    the outputs; `share`, of the rank at which two factors are as large as the dense map; `rank`
    itself. None: maps stay dense.
    """

    energy: float | None = None
    share: float | None = None
    rank: int | None = None

    @classmethod
    def of(cls, value: str | int | float | RankRule) -> RankRule:
        """By `"energy:0.95"`, a whole number (a rank), a fraction (a share), or `"full"`.

        Raises:
            ValueError: anything else, or a value out of range.
        """
        if isinstance(value, RankRule):
            return value
        if value == FULL:
            return cls()
        if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
            return cls(rank=value)
        if isinstance(value, float) and 0 < value <= 1:
            return cls(share=value)
        energy = _number_after(_ENERGY, value)
        if energy is not None and 0 < energy <= 1:
            return cls(energy=energy)
        raise ValueError(
            "rank: expected 'energy:0.95' (the share of the outputs' energy to keep, above 0, at "
            "most 1), a whole number of 1 or more (the rank itself), a fraction above 0 and at "
            "most 1 (of the rank at which nothing is saved) or 'full' (maps stay dense), got "
            f"{value!r}"
        )

    def choose(self, spectrum: Spectrum, in_features: int, out_features: int) -> int | None:
        """The rank of one map; None where two factors would not be smaller than the dense map."""
        most = break_even(in_features, out_features)
        if self.rank is not None:
            rank = self.rank
        elif self.share is not None:
            rank = max(1, int(self.share * most))
        elif self.energy is not None:
            rank = _smallest(spectrum, self.energy)
        else:
            return None
        return rank if rank <= most else None


# How a rank is given: see `RankRule.of`; or by the name of each map.
Rank = str | int | float | RankRule | Mapping[str, int]


def rank_rules(rank: Rank, names: Iterable[str]) -> dict[str, RankRule]:
    """The rule of each map, by name. Where ranks are given by name, the others stay dense.

    Raises:
        ValueError: no rank, or one for a name that is not there.
    """
    known = list(names)
    if not isinstance(rank, Mapping):
        return dict.fromkeys(known, RankRule.of(rank))
    unknown = [name for name in rank if name not in known]
    if unknown:
        raise ValueError(
            f"rank: expected names of maps such as {known[0] if known else None!r}, got "
            f"{unknown[:4]}. Take them from the report of another call"
        )
    return {name: RankRule.of(rank[name]) if name in rank else RankRule() for name in known}


def break_even(in_features: int, out_features: int) -> int:
    """The largest rank whose factors, `r (in + out)` numbers, are fewer than `in * out`."""
    return (in_features * out_features - 1) // (in_features + out_features)


def output_spectrum(
    weight: Tensor, second_moment: Tensor | None = None, *, ridge: float = RIDGE
) -> Spectrum:
    """The eigenvectors and eigenvalues of `W (C + ridge * tr(C) / in) W^T`, in float64.

    Args:
        weight: `W` `[out, in]`.
        second_moment: `C` `[in, in]`, symmetric, positive semidefinite, in squared units of the
            input. None, or zero as of a map that got only zeros: all directions count the same.
        ridge: how much of the mean eigenvalue of `C` is added to all of them.

    Raises:
        ValueError: shapes that do not fit, or values that are not finite.
    """
    _check(weight, second_moment)
    w = weight.detach().double()
    out_features, in_features = w.shape
    # A tall map writes into the span of its columns only: there the eigenproblem is smaller.
    basis, w = torch.linalg.qr(w) if out_features > in_features else (None, w)
    if second_moment is None:
        moment = w @ w.mT
    else:
        c = second_moment.detach().to(w)
        level = c.diagonal().mean()
        # Scaled: float64 squares of what a half-precision input holds neither overflow nor vanish.
        c = (c + c.mT) / (2 * level) if level > 0 else torch.zeros_like(c)
        added = ridge if level > 0 else 1.0
        scale = level if level > 0 else torch.ones_like(level)
        moment = (w @ c @ w.mT + added * (w @ w.mT)) * scale
    energies, directions = torch.linalg.eigh((moment + moment.mT) / 2)
    energies, directions = energies.flip(0).clamp(min=0), directions.flip(1)
    return Spectrum(directions if basis is None else basis @ directions, energies)


def factors_of(weight: Tensor, spectrum: Spectrum, rank: int) -> Factors:
    """The best map of rank `rank`, see above, as two factors in the dtype of `weight`.

    They are balanced: component i has the same norm in both, so that one learning rate fits both.
    The components are nested: the first s of them are the best map of rank s.

    Args:
        weight: `[out, in]`, the one that `spectrum` is of.
        spectrum: of `output_spectrum`.
        rank: `1 .. min(in, out)`.
    """
    most = len(spectrum.energies)
    if not 1 <= rank <= most:
        raise ValueError(f"rank: expected 1 to {most}, got {rank!r}")
    directions = spectrum.directions[:, :rank]
    down = directions.mT @ weight.detach().to(directions)
    norms = down.norm(dim=1)
    scale = torch.where(norms > 0, norms, 1.0).sqrt()
    return Factors((down / scale[:, None]).to(weight.dtype), (directions * scale).to(weight.dtype))


def output_error(weight: Tensor, factors: Factors, second_moment: Tensor | None = None) -> float:
    """`E |W x - W' x|^2 / E |W x|^2` of the factors that are given; 0 of a map that is zero.

    `second_moment` None: the share of the squared weights.
    """
    w = weight.detach().double()
    difference = w - factors.up.detach().to(w) @ factors.down.detach().to(w)
    c = torch.eye(w.shape[1]).to(w) if second_moment is None else second_moment.detach().to(w)
    error, whole = (((x @ c) * x).sum() for x in (difference, w))
    return float(error / whole) if whole > 0 else 0.0


def _smallest(spectrum: Spectrum, energy: float) -> int:
    """The smallest rank that keeps a share `energy`; all directions where rounding hides it."""
    total = spectrum.energies.sum()
    if total == 0:
        return 1
    if energy == 1:
        return len(spectrum.energies)
    kept = spectrum.energies.cumsum(0) / total
    # The number of ranks that keep too little, and one more.
    return min(int((kept < energy).sum()) + 1, len(kept))


def _number_after(prefix: str, value: object) -> float | None:
    if not isinstance(value, str) or not value.startswith(prefix):
        return None
    try:
        return float(value.removeprefix(prefix))
    except ValueError:
        return None


def _check(weight: Tensor, second_moment: Tensor | None) -> None:
    if weight.dim() != 2 or not bool(weight.isfinite().all()):
        raise ValueError(
            f"weight: expected a finite matrix [out, in], got {_seen(weight)}. Check the weights"
        )
    if second_moment is None:
        return
    width = weight.shape[1]
    if second_moment.shape != (width, width) or not bool(second_moment.isfinite().all()):
        raise ValueError(
            f"second_moment: expected a finite matrix [{width}, {width}], one row for each input, "
            f"got {_seen(second_moment)}. Measure it again, on finite inputs of this map"
        )


def _seen(matrix: Tensor) -> str:
    shape = f"{list(matrix.shape)}"
    return shape if bool(matrix.isfinite().all()) else f"{shape} with values that are not finite"
