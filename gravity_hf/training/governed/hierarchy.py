"""Levels of groups that begin to learn one after another, coarse to fine.

The output head belongs to the first level: behind a frozen head that gives zeros nothing learns,
and levels that wait for the first would wait for ever. Besides convergence a level has two other
ways to begin, both by the clock, so none can be starved whatever the signals are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .governor import GovernorState
from .settings import HierarchySettings

_SETTLED = (GovernorState.COOLING, GovernorState.CONVERGED)


class Activation(NamedTuple):
    """A level that began: `reason` is "initial", "convergence", "patience" or "emergency"."""

    level: int
    step: int
    reason: str
    groups: tuple[str, ...]


class HierarchyStep(NamedTuple):
    """What a step did: `activated`, and by group the factor for its learning rate, 0 for one whose
    level waits."""

    activated: tuple[Activation, ...]
    multipliers: dict[str, float]


class Hierarchy:
    """Which levels learn, and how fast each begins.

    Args:
        levels: the groups of each level; the lowest that has groups learns from the start.
        settings: see there.
        total_steps: optimiser steps of the run.

    Raises:
        ValueError: no groups, or no steps.
    """

    def __init__(
        self,
        levels: Mapping[int, Sequence[str]],
        settings: HierarchySettings | None = None,
        *,
        total_steps: int,
    ) -> None:
        self.levels = {level: tuple(levels[level]) for level in sorted(levels) if levels[level]}
        if not self.levels or total_steps < 1:
            raise ValueError(
                "Hierarchy: expected levels with groups and at least one step, got "
                f"{dict(levels)!r} and {total_steps!r} steps"
            )
        self.settings = settings or HierarchySettings()
        self.total_steps = total_steps
        self.activations: dict[int, Activation] = {}
        self._activate(min(self.levels), 0, "initial")

    @property
    def active_groups(self) -> frozenset[str]:
        """Groups whose level learns."""
        return frozenset(group for level in self.activations for group in self.levels[level])

    def is_active(self, level: int) -> bool:
        """Whether `level` learns."""
        return level in self.activations

    def step(self, step: int, states: Mapping[str, GovernorState]) -> HierarchyStep:
        """Activate the levels whose time has come.

        A level begins when all groups of the one before it are cooling or converged; when it has
        waited `patience_fraction` of the run for that; or when `emergency_fraction` of the run is
        over, which activates all that are left.

        Args:
            step: optimiser steps so far.
            states: of every group.
        """
        activated = []
        order = list(self.levels)
        for before, level in zip(order, order[1:], strict=False):
            if self.is_active(level):
                continue
            reason = self._reason(before, step, states)
            if reason is None:
                break
            activated.append(self._activate(level, step, reason))
        return HierarchyStep(tuple(activated), self.multipliers(step))

    def multipliers(self, step: int) -> dict[str, float]:
        """By group: 0 while its level waits; then from `lr_multipliers` to 1 in `warmup_steps`."""
        return {
            group: self._multiplier(level, step)
            for level, groups in self.levels.items()
            for group in groups
        }

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; what `load_state_dict` takes."""
        return {
            "active_levels": sorted(self.activations),
            "activation_steps": {str(k): a.step for k, a in self.activations.items()},
            "activation_reasons": {str(k): a.reason for k, a in self.activations.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            ValueError: levels that are not those of this hierarchy; nothing is changed.
        """
        active = [int(level) for level in state["active_levels"]]
        if active != list(self.levels)[: len(active)] or not active:
            raise ValueError(
                f"Hierarchy.load_state_dict: expected the first of the levels {list(self.levels)}, "
                f"got {active}. The state is of other groups: begin anew"
            )
        steps, reasons = state["activation_steps"], state["activation_reasons"]
        self.activations = {
            k: Activation(k, int(_of(steps, k)), str(_of(reasons, k)), self.levels[k])
            for k in active
        }

    def _reason(self, before: int, step: int, states: Mapping[str, GovernorState]) -> str | None:
        if all(states[group] in _SETTLED for group in self.levels[before]):
            return "convergence"
        if step >= self.settings.emergency_fraction * self.total_steps:
            return "emergency"
        patience = self.settings.patience_fraction
        waited = step - self.activations[before].step
        if patience is not None and waited >= patience * self.total_steps:
            return "patience"
        return None

    def _activate(self, level: int, step: int, reason: str) -> Activation:
        self.activations[level] = Activation(level, step, reason, self.levels[level])
        return self.activations[level]

    def _multiplier(self, level: int, step: int) -> float:
        if not self.is_active(level):
            return 0.0
        base = self.settings.lr_multipliers.get(level, 1.0)
        warmup, past = self.settings.warmup_steps, step - self.activations[level].step
        if past >= warmup:
            return 1.0
        return base + (1.0 - base) * max(past, 0) / warmup


def _of(values: Mapping[Any, Any], level: int) -> Any:
    """By a key that JSON has made text, or that was never in JSON."""
    return values[str(level)] if str(level) in values else values[level]
