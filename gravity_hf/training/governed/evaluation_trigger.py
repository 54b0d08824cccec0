"""Metrics that are computed again when something they depend on has changed.

A group that changes its state makes the metrics that depend on it due. Due metrics run within a
budget of evaluations, the most important and stalest first; what does not fit stays due. A metric
that nothing has made due for long is due by its age, so nothing gets worse unseen for ever.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from .settings import EvaluationSettings

_DEFAULT_IMPORTANCE = 0.5
# How many of the last values the best is taken of.
_RECENT = 10


class Regression(NamedTuple):
    """A metric that has been worse than its recent best for several evaluations in a row.

    `change`: how much worse, as a fraction of `best`.
    """

    metric: str
    step: int
    value: float
    best: float
    change: float


class EvaluationTrigger:
    """Decides which metrics to compute at a step, and computes them.

    Args:
        dependencies: by metric the groups it depends on, as `ParameterGroups.dependencies`; "all"
            stands for every group.
        metrics: by name what computes one; each must be in `dependencies`.
        settings: see there.

    Raises:
        ValueError: a metric without dependencies.
    """

    def __init__(
        self,
        dependencies: Mapping[str, Sequence[str]],
        metrics: Mapping[str, Callable[[], float]],
        settings: EvaluationSettings | None = None,
    ) -> None:
        if missing := sorted(set(metrics) - set(dependencies)):
            raise ValueError(
                f"EvaluationTrigger: expected dependencies of every metric, got none of {missing}. "
                "Give ('all',) where a metric depends on the whole model"
            )
        self.dependencies = {name: tuple(dependencies[name]) for name in metrics}
        self.metrics = dict(metrics)
        self.settings = settings or EvaluationSettings()
        self.regressions: list[Regression] = []
        self.evaluations = 0
        self._due: set[str] = set()
        self._values: dict[str, list[float]] = {name: [] for name in metrics}
        self._last: dict[str, int] = dict.fromkeys(metrics, 0)
        self._worse: dict[str, int] = dict.fromkeys(metrics, 0)
        self._window_start = 0
        self._used = 0

    @property
    def due(self) -> frozenset[str]:
        """Metrics that wait for an evaluation."""
        return frozenset(self._due)

    def notify(self, group: str) -> None:
        """A group has changed its state: what depends on it is due."""
        self._due |= {
            name for name, groups in self.dependencies.items() if group in groups or "all" in groups
        }

    def step(self, step: int, *, force: bool = False) -> dict[str, float]:
        """Compute what is due and fits into the budget; the values, by metric.

        Args:
            step: optimiser steps so far.
            force: compute every metric, whatever the budget.
        """
        if step - self._window_start >= self.settings.window_steps:
            self._window_start, self._used = step, 0
        wanted = self._chosen(step, force)
        values = {}
        for name in wanted:
            # Due until it has been computed: one that raises is not forgotten.
            values[name] = self._compute(name, step)
            self._due.discard(name)
            self._used += 1
        return values

    def record(self, metric: str, step: int, value: float) -> None:
        """Take a value that somebody else has measured; it is as good as an evaluation.

        Raises:
            ValueError: no metric of this trigger.
        """
        if metric not in self.metrics:
            raise ValueError(
                f"EvaluationTrigger.record: expected one of {sorted(self.metrics)}, got {metric!r}"
            )
        self._note(metric, step, value)
        if metric in self._due:
            self._due.discard(metric)
            self._used += 1

    def state_dict(self) -> dict[str, Any]:
        """JSON-able; what `load_state_dict` takes."""
        return {
            "due": sorted(self._due),
            "values": {name: list(values) for name, values in self._values.items()},
            "last": dict(self._last),
            "worse": dict(self._worse),
            "window_start": self._window_start,
            "used": self._used,
            "evaluations": self.evaluations,
            "regressions": [one._asdict() for one in self.regressions],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`. Of metrics that are not here any more nothing is taken; one that is
        new begins."""
        known = set(self.metrics)
        self._due = set(state["due"]) & known
        for name in known & set(state["values"]):
            self._values[name] = [float(value) for value in state["values"][name]]
            self._last[name] = int(state["last"][name])
            self._worse[name] = int(state["worse"][name])
        self._window_start, self._used = int(state["window_start"]), int(state["used"])
        self.evaluations = int(state["evaluations"])
        self.regressions = [Regression(**one) for one in state["regressions"]]

    def _chosen(self, step: int, force: bool) -> list[str]:
        oldest = self.settings.staleness_steps
        if oldest is not None:
            self._due |= {name for name, last in self._last.items() if step - last >= oldest}
        if force:
            return self._ordered(self.metrics, step)
        room = max(self.settings.max_evaluations_per_window - self._used, 0)
        return self._ordered(self._due, step)[:room]

    def _ordered(self, names: Iterable[str], step: int) -> list[str]:
        """By staleness times importance; names decide between equals, so that runs repeat."""

        def rank(name: str) -> tuple[float, str]:
            importance = self.settings.importance.get(name, _DEFAULT_IMPORTANCE)
            return -(step - self._last[name]) * importance, name

        return sorted(names, key=rank)

    def _compute(self, name: str, step: int) -> float:
        value = float(self.metrics[name]())
        self._note(name, step, value)
        return value

    def _note(self, name: str, step: int, value: float) -> None:
        self.evaluations += 1
        self._last[name] = step
        past = self._values[name]
        if past:
            self._compare(name, step, value, past)
        # A value that is no number is no best to compare with.
        self._values[name] = ([*past, value] if math.isfinite(value) else past)[-_RECENT:]

    def _compare(self, name: str, step: int, value: float, past: list[float]) -> None:
        lower = self.settings.directions.get(name, "lower") == "lower"
        best = min(past) if lower else max(past)
        loss = value - best if lower else best - value
        change = loss / max(abs(best), 1e-12) if math.isfinite(value) else math.inf
        self._worse[name] = (
            self._worse[name] + 1 if change > self.settings.regression_threshold else 0
        )
        if self._worse[name] >= self.settings.regression_window:
            self.regressions.append(Regression(name, step, value, best, change))
            self._worse[name] = 0
