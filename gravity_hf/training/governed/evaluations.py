"""Evaluations that a change of state has made due, by Trainer's own `evaluate`."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .evaluation_trigger import EvaluationTrigger, Regression
from .settings import EvaluationSettings

# Trainer's validation loss, as taxonomies call what depends on it.
PERPLEXITY = "perplexity"
_LARGEST_EXPONENT = 700.0


class _NotMeasuredYetError(Exception):
    """Trainer has to evaluate first."""


class Evaluations:
    """An `EvaluationTrigger` whose perplexity is that of Trainer's evaluation.

    Args:
        dependencies: by metric the groups it depends on.
        metrics: further ones, each a function of nothing.
        settings: of the trigger.
        has_data: whether Trainer can evaluate.
    """

    def __init__(
        self,
        dependencies: Mapping[str, Sequence[str]],
        metrics: Mapping[str, Callable[[], float]],
        settings: EvaluationSettings,
        *,
        has_data: bool,
    ) -> None:
        functions = dict(metrics)
        if has_data and PERPLEXITY in dependencies:
            functions[PERPLEXITY] = _ask_trainer
        self.trigger = EvaluationTrigger(dependencies, functions, settings)

    def changed(self, groups: Iterable[str]) -> None:
        """Their states did: what depends on them is due."""
        for group in groups:
            self.trigger.notify(group)

    def step(self, step: int) -> bool:
        """Compute what is due; whether Trainer should evaluate after this step."""
        try:
            self.trigger.step(step)
        except _NotMeasuredYetError:
            return True
        return False

    def evaluated(self, step: int, results: Mapping[str, Any]) -> list[Regression]:
        """Take what Trainer's evaluation says, whoever has asked for it; regressions it shows.

        With several evaluation sets their mean loss counts."""
        losses = [
            float(value)
            for name, value in results.items()
            if name.startswith("eval_") and name.endswith("loss")
        ]
        if not losses or PERPLEXITY not in self.trigger.metrics:
            return []
        known = len(self.trigger.regressions)
        loss = sum(losses) / len(losses)
        self.trigger.record(PERPLEXITY, step, math.exp(min(loss, _LARGEST_EXPONENT)))
        return self.trigger.regressions[known:]


def _ask_trainer() -> float:
    raise _NotMeasuredYetError
