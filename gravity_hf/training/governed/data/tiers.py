"""Tiers of difficulty, by the loss of a sample."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

DRAWN = 4


class Tier(IntEnum):
    """How a model does on a sample. `UNKNOWN`: it was never scored; `EXCLUDED`: its loss says that
    there is nothing to learn from it."""

    EXCLUDED = -2
    UNKNOWN = -1
    MASTERED = 0
    LEARNING = 1
    STRUGGLING = 2
    FAILING = 3


@dataclass(frozen=True)
class TierSettings:
    """Where tiers begin, in nats per token, and how much of the draws each gets.

    Attributes:
        learning: from here on a sample is LEARNING; below it is MASTERED.
        struggling: from here on STRUGGLING.
        failing: from here on FAILING.
        quality_floor: below it a sample is EXCLUDED: known by heart, or empty; None: none is.
        quality_ceiling: above it a sample is EXCLUDED: noise; None: none is.
        fractions: of the draws, for MASTERED to FAILING; those of tiers without samples go to the
            others.
    """

    learning: float = 1.0
    struggling: float = 4.0
    failing: float = 8.0
    quality_floor: float | None = 0.1
    quality_ceiling: float | None = 20.0
    fractions: tuple[float, ...] = field(default=(0.1, 0.3, 0.4, 0.2))

    def __post_init__(self) -> None:
        object.__setattr__(self, "fractions", checked_fractions(self.fractions))
        bounds = [self.quality_floor or 0.0, self.learning, self.struggling, self.failing]
        bounds.append(math.inf if self.quality_ceiling is None else self.quality_ceiling)
        if any(low > high for low, high in zip(bounds, bounds[1:], strict=False)) or bounds[0] < 0:
            raise ValueError(
                "TierSettings: expected quality_floor <= learning <= struggling <= failing <= "
                f"quality_ceiling, 0 or more, got {bounds}"
            )

    def tiers(self, losses: np.ndarray) -> np.ndarray:
        """`[N]`, int8, of losses `[N]`; NaN is a sample that was not scored."""
        losses = np.asarray(losses, dtype=np.float64)
        found = np.digitize(losses, [self.learning, self.struggling, self.failing]).astype(np.int8)
        if self.quality_floor is not None:
            found[losses < self.quality_floor] = Tier.EXCLUDED
        if self.quality_ceiling is not None:
            found[losses > self.quality_ceiling] = Tier.EXCLUDED
        found[np.isnan(losses)] = Tier.UNKNOWN
        return found


def checked_fractions(fractions: object) -> tuple[float, ...]:
    """Four numbers from 0 on, not all 0.

    Raises:
        ValueError: something else.
    """
    if isinstance(fractions, Mapping):
        # As the published settings have them; keys of JSON are text.
        by_tier = {int(tier): value for tier, value in fractions.items()}
        fractions = [by_tier.get(tier, 0.0) for tier in range(DRAWN)]
    try:
        values = tuple(float(value) for value in fractions)  # type: ignore[attr-defined]
    except (TypeError, ValueError):
        values = ()
    if len(values) != DRAWN or not all(0 <= v < math.inf for v in values) or not sum(values):
        raise ValueError(
            f"fractions: expected {DRAWN} numbers of 0 or more (mastered, learning, struggling, "
            f"failing), not all 0, got {fractions!r}"
        )
    return values
