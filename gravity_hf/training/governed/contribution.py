"""Which groups the loss owes its fall to."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any


class LossContribution:
    """Shares of the groups in what the loss lost of late.

    To first order a step `dw` of a group takes `-<g, dw>` from the loss; where that is negative it
    took nothing. These are averaged with the weight `decay` for the past, and divided by their sum.

    Args:
        groups: names.
        decay: of the moving averages.

    Raises:
        ValueError: a decay that is not from 0 to below 1.
    """

    def __init__(self, groups: Iterable[str], *, decay: float = 0.95) -> None:
        if not 0 <= decay < 1:
            raise ValueError(
                f"LossContribution.decay: expected a number from 0 to below 1, got {decay!r}"
            )
        self.decay = decay
        self.averages: dict[str, float] = dict.fromkeys(groups, 0.0)

    def update(self, gains: Mapping[str, float]) -> dict[str, float]:
        """Take `-<g, dw>` (nats) of one step by group; the shares after it.

        A group that is not named took no step, and gained nothing. A value that is not finite
        counts as that: a loss scaler has skipped the step.

        Raises:
            ValueError: a group that is not known; nothing is changed.
        """
        if unknown := sorted(set(gains) - set(self.averages)):
            raise ValueError(
                f"LossContribution.update: expected groups of {sorted(self.averages)}, got "
                f"{unknown}"
            )
        for name, past in self.averages.items():
            gain = gains.get(name, 0.0)
            gain = max(0.0, gain) if math.isfinite(gain) else 0.0
            self.averages[name] = self.decay * past + (1 - self.decay) * gain
        return self.shares()

    def shares(self) -> dict[str, float]:
        """By group, of 1 together; all 0 before anything was gained."""
        total = math.fsum(self.averages.values())
        return {name: value / total if total > 0 else 0.0 for name, value in self.averages.items()}

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; what `load_state_dict` takes."""
        return {"averages": dict(self.averages)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            ValueError: of other groups; nothing is changed.
        """
        averages = state["averages"]
        if set(averages) != set(self.averages):
            raise ValueError(
                f"LossContribution.load_state_dict: expected the groups {sorted(self.averages)}, "
                f"got {sorted(averages)}. The state is of other groups: begin anew"
            )
        self.averages = {name: float(averages[name]) for name in self.averages}
