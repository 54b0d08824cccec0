"""What a governed run has been through so far, JSON-able."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from .state import Governance, StepOutcome

# Points of a trace that is kept of a whole run, about.
_POINTS = 100


@dataclass
class History:
    """Of all steps so far.

    Attributes:
        steps: optimiser steps.
        group_steps: by group, in how many of them it got gradients.
        multipliers: by group, the sum of the factors of its rates; 0 where it did not learn.
        flops: by the groups that learned (joined with "+"): forward and backward operations of one
            batch, counted while they ran.
        flops_steps: by the same, optimiser steps.
        changes: of states, with their steps.
        activations: of levels.
        regressions: of metrics.
        probes: gradients of converged groups over the batches that probed them.
        captured: shares of the gradients that the router chose, the best choice would have, and
            one at random.
        skipped: steps without any gradient.
        trace: every few steps, states, allocations, multipliers and gradients over their peaks.
    """

    steps: int = 0
    group_steps: dict[str, int] = field(default_factory=dict)
    multipliers: dict[str, float] = field(default_factory=dict)
    flops: dict[str, list[int]] = field(default_factory=dict)
    flops_steps: dict[str, int] = field(default_factory=dict)
    changes: list[dict[str, Any]] = field(default_factory=list)
    activations: list[dict[str, Any]] = field(default_factory=list)
    regressions: list[dict[str, Any]] = field(default_factory=list)
    probes: list[dict[str, Any]] = field(default_factory=list)
    captured: list[dict[str, float]] = field(default_factory=list)
    skipped: int = 0
    trace: list[dict[str, Any]] = field(default_factory=list)

    def count(self, learned: Collection[str], multipliers: Mapping[str, float]) -> None:
        """One optimiser step, in which the groups `learned` did."""
        self.steps += 1
        for name, multiplier in multipliers.items():
            did = name in learned
            self.group_steps[name] = self.group_steps.get(name, 0) + did
            self.multipliers[name] = self.multipliers.get(name, 0.0) + multiplier * did
        self.skipped += not learned
        key = key_of(learned)
        self.flops_steps[key] = self.flops_steps.get(key, 0) + 1

    def note(self, outcome: StepOutcome) -> None:
        """Changes and activations of a step."""
        self.changes += [change._asdict() for change in outcome.changes]
        # As JSON has it, so that a resumed run says the same.
        begun = [one._asdict() | {"groups": list(one.groups)} for one in outcome.activations]
        self.activations += begun

    def sample(self, step: int, total: int, machines: Governance) -> None:
        """A point of the trace where one is due."""
        if step % max(1, total // _POINTS) == 0:
            budget = machines.budget
            self.trace.append(
                {
                    "step": step,
                    "states": {name: state.value for name, state in machines.states.items()},
                    "gradients": machines.gradient_ratios,
                    "allocations": None if budget is None else dict(budget.allocations),
                    "multipliers": machines.multipliers(step),
                }
            )

    def state_dict(self) -> dict[str, Any]:
        """What `History(**state)` takes."""
        return asdict(self)


def key_of(learning: Collection[str]) -> str:
    """The name of a set of groups."""
    return "+".join(sorted(learning))


def groups_of(key: str) -> list[str]:
    """What `key_of` made a name of."""
    return key.split("+") if key else []
