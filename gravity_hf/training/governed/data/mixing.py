"""Which sample comes next: a queue for each tier, and turns between them by their fractions."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .tiers import DRAWN, Tier

DRAWN_TIERS = (Tier.UNKNOWN, *(Tier(tier) for tier in range(DRAWN)))


class Mixture:
    """Draws indices of an epoch.

    The tier whose turn is the most overdue is next: each gains its fraction with every draw and
    pays 1 for one of its own. Within a tier samples go in a random order, in repeated epochs those
    first that were drawn least often.

    Args:
        tiers: `[N]`, int8; read at `refill`, changed by others.
        counts: `[N]`, int32: how often each was drawn; counted on here.
        fractions: of the draws, for MASTERED to FAILING.
        unknown_fraction: of the draws; None: the share of samples that are unknown.
        repeats: whether a tier begins anew when all of it was drawn.
        order: `[N]`, a permutation: who goes first within a tier.
    """

    def __init__(
        self,
        tiers: np.ndarray,
        counts: np.ndarray,
        fractions: Sequence[float],
        unknown_fraction: float | None,
        *,
        repeats: bool,
        order: np.ndarray,
    ) -> None:
        self.tiers, self.counts = tiers, counts
        self.fractions, self.unknown_fraction = tuple(fractions), unknown_fraction
        self.repeats = repeats
        self._rank = np.empty(len(order), np.int64)
        self._rank[order] = np.arange(len(order))
        self._drawn = np.zeros(len(order), bool)
        self._credits = dict.fromkeys(DRAWN_TIERS, 0.0)
        self._queues: dict[Tier, np.ndarray] = {}
        self._next: dict[Tier, int] = {}
        self._weights: dict[Tier, float] = {}
        self.refill()

    @property
    def is_empty(self) -> bool:
        """Whether nothing is left to draw."""
        return not self._weights

    def refill(self) -> None:
        """Sort the samples into queues anew: tiers have changed."""
        for tier in DRAWN_TIERS:
            self._queue(tier)
        self._weigh()

    def draw(self) -> int | None:
        """The next index; None where nothing is left."""
        if self.is_empty:
            return None
        for tier, weight in self._weights.items():
            self._credits[tier] += weight
        # The first of equals.
        tier = max(self._weights, key=self._credits.__getitem__)
        self._credits[tier] -= 1.0
        index = int(self._queues[tier][self._next[tier]])
        self._next[tier] += 1
        self._drawn[index] = True
        self.counts[index] += 1
        if self._next[tier] == len(self._queues[tier]):
            if self.repeats:
                self._queue(tier)
            else:
                self._weigh()
        return index

    def _queue(self, tier: Tier) -> None:
        here = self.tiers == tier
        if self.repeats:
            found = np.flatnonzero(here)
            found = found[np.lexsort((self._rank[found], self.counts[found]))]
        else:
            found = np.flatnonzero(here & ~self._drawn)
            found = found[np.argsort(self._rank[found])]
        self._queues[tier], self._next[tier] = found, 0

    def _weigh(self) -> None:
        """Fractions of the tiers that have something to draw, of 1 together."""
        left = {t: len(self._queues[t]) - self._next[t] for t in DRAWN_TIERS}
        known = {t: self.fractions[t] for t in DRAWN_TIERS[1:] if left[t]}
        share = self.unknown_fraction
        if share is None:
            share = left[Tier.UNKNOWN] / max(sum(left.values()), 1)
        total = sum(known.values())
        weights = {t: (1.0 - share) * f / total for t, f in known.items() if f and total}
        if left[Tier.UNKNOWN]:
            weights[Tier.UNKNOWN] = share
        if not sum(weights.values()):
            # Only tiers that have no fraction are left.
            weights = {t: 1.0 for t in DRAWN_TIERS if left[t]}
        scale = sum(weights.values())
        self._weights = {t: w / scale for t, w in weights.items() if w}
        # What a tier that is empty was owed, nobody owes the others.
        self._credits = {t: self._credits[t] if t in self._weights else 0.0 for t in DRAWN_TIERS}
