"""One budget shared between groups by need, and what a share does to learning.

`allocate` is exact water-filling: shares in proportion to needs, each between its floor and its
ceiling, and together the whole budget. What is shared is how fast groups learn: as a factor of
their learning rates (`multipliers`), or as how often they step (`periods`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .governor import GovernorState
from .settings import BudgetSettings

TOLERANCE = 1e-12
# Weight of a group's need by its state.
STATE_WEIGHTS = {
    GovernorState.PENDING: 0.0,
    GovernorState.ACTIVE: 1.0,
    GovernorState.COOLING: 0.5,
    GovernorState.CONVERGED: 0.0,
    GovernorState.AWAKENED: 1.2,
}
# Needs this far under the largest count as that much: their ratios would leave the numbers.
_SMALLEST = 1e-30


def allocate(
    needs: Sequence[float], floors: Sequence[float], caps: Sequence[float], master: float
) -> list[float]:
    """Shares `a_i = clip(t * n_i, f_i, c_i)` with the one `t` for which they sum up to the budget.

    A group without need gets its floor. Where the floors together exceed the budget, each shrinks
    by the same factor; where the caps of those with need are below it, they get their caps.

    Args:
        needs: 0 or more, in any unit.
        floors: least shares.
        caps: largest shares.
        master: the budget.

    Raises:
        ValueError: lengths that differ, a value that is negative or not finite, a cap below its
            floor.
        RuntimeError: the result breaks a promise: a defect of this function.
    """
    needs, floors, caps = list(needs), list(floors), list(caps)
    _check(needs, floors, caps, master)
    floors = fitting_floors(floors, master)
    largest = max(needs, default=0.0)
    if largest == 0.0:
        shares = list(floors)
    else:
        scaled = [max(n / largest, _SMALLEST) if n > 0 else 0.0 for n in needs]
        shares = _filled(scaled, floors, caps, master)
    _verify(shares, needs, floors, caps, master)
    return shares


def fitting_floors(floors: Sequence[float], master: float) -> list[float]:
    """The floors, each shrunk by the same factor where they exceed `master` together."""
    total = math.fsum(floors)
    return list(floors) if total <= master else [f * (master / total) for f in floors]


@dataclass(frozen=True)
class Need:
    """Why a group should learn; each from 0 to 1.

    Attributes:
        gradient: over its peak.
        contribution: its share of what the loss lost of late.
        remaining: its gradient over the first it had: near 1 where all is still to learn.
    """

    gradient: float = 1.0
    contribution: float = 0.0
    remaining: float = 1.0


class Budget:
    """Shares of all groups, computed anew every `eval_window` steps and whenever a state changes.

    Args:
        groups: names.
        settings: see there.
    """

    def __init__(self, groups: Iterable[str], settings: BudgetSettings | None = None) -> None:
        self.groups = tuple(groups)
        self.settings = settings or BudgetSettings()
        self.allocations: dict[str, float] = dict.fromkeys(self.groups, 0.0)
        # Whether the floors had to shrink to fit into the budget.
        self.floor_infeasible = False
        self._states: dict[str, GovernorState] = {}
        self._boosts: dict[str, float] = {}
        self._allocated_at: int | None = None

    def boost(self, factors: Mapping[str, float]) -> None:
        """Multiply the needs of some groups from the next allocation on; of all others, not."""
        self._boosts = dict(factors)

    def step(
        self, step: int, states: Mapping[str, GovernorState], needs: Mapping[str, Need]
    ) -> bool:
        """Share the budget where it is time to; whether it was shared.

        Args:
            step: optimiser steps so far.
            states: of every group.
            needs: of every group that learns; others are not looked at.
        """
        last = self._allocated_at
        due = last is None or step - last >= self.settings.eval_window
        if not due and all(self._states.get(name) is states[name] for name in self.groups):
            return False
        self._share(states, needs)
        self._allocated_at = step
        return True

    def multipliers(self) -> dict[str, float]:
        """Factors for learning rates: a share over the mean share of those that learn, within the
        bounds of the settings; 0 for groups that do not learn."""
        learning = [name for name in self.groups if self._learns(name)]
        low, high = self.settings.least_multiplier, self.settings.most_multiplier
        factors = dict.fromkeys(self.groups, 0.0)
        for name in learning:
            share = self.allocations[name] * len(learning) / self.settings.master_budget
            factors[name] = min(max(share, low), high)
        return factors

    def periods(self) -> dict[str, int]:
        """Every how many steps a group takes one, where the budget is spent on steps instead of
        rates; 0 for groups that do not learn."""
        return {
            name: round(1 / min(1.0, factor)) if factor > 0 else 0
            for name, factor in self.multipliers().items()
        }

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; what `load_state_dict` takes."""
        return {
            "allocations": dict(self.allocations),
            "floor_infeasible": self.floor_infeasible,
            "states": {name: state.value for name, state in self._states.items()},
            "boosts": dict(self._boosts),
            "allocated_at": self._allocated_at,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            ValueError: of other groups; nothing is changed.
        """
        if set(state["allocations"]) != set(self.groups):
            raise ValueError(
                f"Budget.load_state_dict: expected the groups {sorted(self.groups)}, got "
                f"{sorted(state['allocations'])}. The state is of other groups: begin anew"
            )
        self.allocations = {name: float(state["allocations"][name]) for name in self.groups}
        self.floor_infeasible = bool(state["floor_infeasible"])
        self._states = {name: GovernorState(value) for name, value in state["states"].items()}
        self._boosts = {name: float(value) for name, value in state["boosts"].items()}
        self._allocated_at = state["allocated_at"]

    def _share(self, states: Mapping[str, GovernorState], needs: Mapping[str, Need]) -> None:
        self._states = {name: states[name] for name in self.groups}
        wanted, floors, caps = [], [], []
        floor = self.settings.floor_fraction * self.settings.master_budget
        ceiling = self.settings.ceiling_fraction * self.settings.master_budget
        for name in self.groups:
            state = self._states[name]
            reserved = floor if self.settings.reserve_converged else 0.0
            least = {GovernorState.PENDING: 0.0, GovernorState.CONVERGED: reserved}
            floors.append(least.get(state, floor))
            caps.append(least.get(state, ceiling))
            wanted.append(self._need(name, needs) if state.learns else 0.0)
        master = self.settings.master_budget
        self.floor_infeasible = math.fsum(floors) > master
        shares = allocate(wanted, floors, caps, master)
        self.allocations = dict(zip(self.groups, shares, strict=True))

    def _need(self, name: str, needs: Mapping[str, Need]) -> float:
        need, rule = needs[name], self.settings
        parts = (need.gradient, need.contribution, need.remaining)
        weights = (rule.alpha, rule.beta, rule.gamma)
        total = math.fsum(w * min(max(p, 0.0), 1.0) for w, p in zip(weights, parts, strict=True))
        return STATE_WEIGHTS[self._states[name]] * self._boosts.get(name, 1.0) * total

    def _learns(self, name: str) -> bool:
        return name in self._states and self._states[name].learns


def _filled(
    needs: list[float], floors: list[float], caps: list[float], master: float
) -> list[float]:
    """The shares at the level where they sum up to `master`.

    As the level rises a share leaves its floor at `f/n` and stops at `c/n`. Between two such points
    the shares that rise do so together; the level in the right piece is one division away.
    """
    points = [
        (bound / need, kind, i)
        for i, need in enumerate(needs)
        if need > 0
        for kind, bound in ((0, floors[i]), (1, caps[i]))
    ]
    shares, rising = list(floors), set[int]()
    for level, kind, i in sorted(points):
        # Everything that rises, at this level: the first level that is too high ends the walk.
        reached = _at(level, shares, rising, needs)
        if math.fsum(reached) >= master:
            break
        if kind == 0:
            rising.add(i)
        else:
            rising.discard(i)
            shares[i] = caps[i]
    if not rising:
        return shares
    rest = master - math.fsum(share for i, share in enumerate(shares) if i not in rising)
    total = math.fsum(needs[i] for i in rising)
    for i in rising:
        shares[i] = min(max(rest * (needs[i] / total), floors[i]), caps[i])
    return shares


def _at(level: float, shares: list[float], rising: set[int], needs: list[float]) -> list[float]:
    return [level * needs[i] if i in rising else share for i, share in enumerate(shares)]


def _check(needs: list[float], floors: list[float], caps: list[float], master: float) -> None:
    if not len(needs) == len(floors) == len(caps):
        raise ValueError(
            "allocate: expected as many needs as floors and caps, got "
            f"{len(needs)}, {len(floors)} and {len(caps)}"
        )
    for name, values in (
        ("needs", needs),
        ("floors", floors),
        ("caps", caps),
        ("master", [master]),
    ):
        for value in values:
            if not 0 <= value < math.inf:
                raise ValueError(f"allocate: {name}: expected 0 or more, got {value!r}")
    for floor, cap in zip(floors, caps, strict=True):
        if floor > cap:
            raise ValueError(f"allocate: expected caps over their floors, got {cap} under {floor}")


def _verify(
    shares: list[float],
    needs: list[float],
    floors: list[float],
    caps: list[float],
    master: float,
) -> None:
    scale = max(1.0, master)
    reachable = math.fsum(c if n > 0 else f for n, f, c in zip(needs, floors, caps, strict=True))
    spent, expected = math.fsum(shares), min(master, reachable)
    within = all(
        f - TOLERANCE * scale <= a <= c + TOLERANCE * scale
        for a, f, c in zip(shares, floors, caps, strict=True)
    )
    if not within or abs(spent - expected) > TOLERANCE * scale:
        raise RuntimeError(
            f"allocate: expected shares within their bounds that sum up to {expected!r}, got "
            f"{shares} with the sum {spent!r} for floors {floors} and caps {caps}"
        )
