"""The machines of governed training together: signals of a step in, decisions for the next out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from .budget import Budget, Need
from .contribution import LossContribution
from .governor import Governor, GovernorState
from .hierarchy import Activation, Hierarchy
from .measuring import GroupSignal
from .settings import BudgetSettings, GovernorSettings, HierarchySettings

Apply = Literal["lr", "duty", "none"]


class Change(NamedTuple):
    """A group that entered another state, at the optimiser step `step`; `ratio`: its gradient over
    its peak then."""

    step: int
    group: str
    old_state: str
    new_state: str
    ratio: float


class StepOutcome(NamedTuple):
    """What one step changed."""

    changes: tuple[Change, ...]
    activations: tuple[Activation, ...]


class Governance:
    """Governors, hierarchy, budget and contributions of a run, without model and optimiser.

    Args:
        levels: of every group.
        total_steps: optimiser steps of the run.
        governors: None: groups stay active for ever.
        hierarchy: None: all levels learn from the start.
        budget: None: every group has the rate that is scheduled.
        freeze: whether converged groups stop learning; False only notes that they would.
        apply: what a share of the budget does: "lr" multiplies rates, "duty" lets a group step
            less often, "none" is noted and nothing more. Levels multiply rates in any case.
    """

    def __init__(
        self,
        levels: Mapping[str, int],
        total_steps: int,
        *,
        governors: GovernorSettings | None,
        hierarchy: HierarchySettings | None,
        budget: BudgetSettings | None,
        freeze: bool = True,
        apply: Apply = "lr",
    ) -> None:
        self.groups = tuple(levels)
        self.freeze = freeze
        self.apply = apply
        self.is_governed = governors is not None
        by_level: dict[int, list[str]] = {}
        for name, level in levels.items():
            by_level.setdefault(level, []).append(name)
        self.hierarchy = (
            None if hierarchy is None else Hierarchy(by_level, hierarchy, total_steps=total_steps)
        )
        begins = self.groups if self.hierarchy is None else self.hierarchy.active_groups
        self.governors = {n: Governor(n, governors, pending=n not in begins) for n in self.groups}
        self.budget = None if budget is None else Budget(self.groups, budget)
        self.contribution = LossContribution(self.groups)
        self.probe_interval = (governors or GovernorSettings()).probe_interval
        self._share(0)

    @property
    def states(self) -> dict[str, GovernorState]:
        """Of every group."""
        return {name: governor.state for name, governor in self.governors.items()}

    @property
    def gradient_ratios(self) -> dict[str, float]:
        """Gradients over their peaks."""
        return {name: governor.ratio for name, governor in self.governors.items()}

    def learning(self) -> set[str]:
        """Groups that get gradients, were it not for duty."""
        return {name for name, state in self.states.items() if self._learns(state)}

    def on_duty(self, step: int) -> set[str]:
        """Groups that take the optimiser step number `step`, 0-based."""
        learning = self.learning()
        if self.apply != "duty" or self.budget is None:
            return learning
        periods = self.budget.periods()
        return {name for name in learning if step % max(periods[name], 1) == 0}

    def multipliers(self, step: int) -> dict[str, float]:
        """Factors of the scheduled rates at the step number `step`, 0-based; 0: does not learn."""
        factors = {name: 1.0 if name in self.learning() else 0.0 for name in self.groups}
        if self.hierarchy is not None:
            levels = self.hierarchy.multipliers(step)
            factors = {name: factor * levels[name] for name, factor in factors.items()}
        if self.budget is not None and self.apply == "lr":
            shares = self.budget.multipliers()
            # A converged group that is not frozen has no share to be multiplied by.
            factors = {n: factor * (shares[n] or 1.0) for n, factor in factors.items()}
        return factors

    def advance(self, step: int, signals: Mapping[str, GroupSignal]) -> StepOutcome:
        """Take the signals of the groups that learned in a step, the `step`-th of the run."""
        before = self.states
        self.contribution.update({name: s.contribution for name, s in signals.items()})
        if self.is_governed:
            for name, signal in signals.items():
                self.governors[name].update(signal)
        activations: tuple[Activation, ...] = ()
        if self.hierarchy is not None:
            activations = self.hierarchy.step(step, self.states).activated
            for activation in activations:
                for name in activation.groups:
                    self.governors[name].activate()
        self._share(step)
        return StepOutcome(self._changes(step, before), activations)

    def converged(self) -> set[str]:
        """Groups that a probe may awaken."""
        return {n for n, state in self.states.items() if state is GovernorState.CONVERGED}

    def probe(self, step: int, gradients: Mapping[str, float]) -> StepOutcome:
        """Take root mean square gradients of converged groups."""
        before = self.states
        for name, gradient in gradients.items():
            self.governors[name].probe(gradient)
        self._share(step)
        return StepOutcome(self._changes(step, before), ())

    def boost(self, factors: Mapping[str, float]) -> None:
        """Multiply the needs of some groups from the next allocation on; of all others, not."""
        if self.budget is not None:
            self.budget.boost(factors)

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; what `load_state_dict` takes."""
        return {
            "governors": {name: one.state_dict() for name, one in self.governors.items()},
            "hierarchy": None if self.hierarchy is None else self.hierarchy.state_dict(),
            "budget": None if self.budget is None else self.budget.state_dict(),
            "contribution": self.contribution.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`.

        Raises:
            ValueError: of other groups, or of other machines.
        """
        found = {name: state[name] is None for name in ("hierarchy", "budget")}
        wanted = {"hierarchy": self.hierarchy is None, "budget": self.budget is None}
        if set(state["governors"]) != set(self.groups) or found != wanted:
            raise ValueError(
                f"GovernedTraining: expected a state of the groups {sorted(self.groups)} with "
                f"{_switched(wanted)}, got one of {sorted(state['governors'])} with "
                f"{_switched(found)}: the checkpoint is of a run with other settings. Resume with "
                "those, or begin in another folder"
            )
        for name, governor in self.governors.items():
            governor.load_state_dict(state["governors"][name])
        for name, machine in (("hierarchy", self.hierarchy), ("budget", self.budget)):
            if machine is not None:
                machine.load_state_dict(state[name])
        self.contribution.load_state_dict(state["contribution"])

    def _learns(self, state: GovernorState) -> bool:
        if state is GovernorState.CONVERGED:
            return not self.freeze
        return state.learns

    def _share(self, step: int) -> None:
        if self.budget is None:
            return
        shares = self.contribution.shares()
        needs = {
            name: Need(one.ratio, shares[name], one.remaining)
            for name, one in self.governors.items()
        }
        self.budget.step(step, self.states, needs)

    def _changes(self, step: int, before: Mapping[str, GovernorState]) -> tuple[Change, ...]:
        return tuple(
            Change(step, name, before[name].value, one.state.value, one.ratio)
            for name, one in self.governors.items()
            if one.state is not before[name]
        )


def _switched(off: Mapping[str, bool]) -> str:
    return " and ".join(f"{'no ' if is_off else 'a '}{name}" for name, is_off in off.items())
