"""A curved distance between positions: what takes the place of the squared distance."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Curvature:
    """`D = max(s (1 + kappa cos sqrt(s + horizon)), horizon)` of a squared distance `s >= 0`.

    The law of the Lightweight Gravitational Transformer for heads with a curvature. Where
    `|kappa| >= 1` the factor can be 0 or less: `D` is `horizon` at such distances, too. `kappa = 0`
    leaves the floor, `max(s, horizon)`; that model's heads without curvature have `s + horizon`
    instead, which is no curvature and `eps = horizon`.

    Args:
        kappa: a finite number.
        horizon: floor of `D` and guard of the root, in units of squared distance; positive.

    Raises:
        ValueError: a value outside its range.
    """

    kappa: float
    horizon: float = 1e-6

    def __post_init__(self) -> None:
        if not _is_number(self.kappa) or not math.isfinite(self.kappa):
            raise ValueError(f"Curvature.kappa: expected a finite number, got {self.kappa!r}")
        if not _is_number(self.horizon) or not 0 < self.horizon < math.inf:
            raise ValueError(
                f"Curvature.horizon: expected a finite number > 0, got {self.horizon!r}"
            )

    def distance(self, distance_sq: Tensor) -> Tensor:
        """`D` of squared distances of any shape, which must not be negative; differentiable."""
        if self.kappa == 0:
            return distance_sq.clamp(min=self.horizon)
        factor = (distance_sq + self.horizon).sqrt().cos().mul(self.kappa).add(1.0)
        return (distance_sq * factor).clamp(min=self.horizon)

    def slope(self, distance_sq: Tensor) -> Tensor:
        """`dD/ds`: 0 where the floor holds, and `1 + kappa (cos r - s sin(r) / 2r)` with
        `r = sqrt(s + horizon)` elsewhere."""
        root = (distance_sq + self.horizon).sqrt_()
        cosine = root.cos()
        slope = root.sin().mul_(distance_sq).div_(root).mul_(-0.5).add_(cosine)
        # In the dtype of the distances: on a CPU a mask of bools costs more than a cosine.
        above = cosine.mul_(self.kappa).add_(1.0).mul_(distance_sq).ge_(self.horizon)
        return slope.mul_(self.kappa).add_(1.0).mul_(above)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
