"""Metrics run when what they depend on has changed, and none is forgotten."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

import pytest

from gravity_hf.training.governed import EvaluationSettings, EvaluationTrigger

DEPENDENCIES = {
    "perplexity": ("all",),
    "attention_sparsity": ("gates",),
    "adaptive_depth": ("norms",),
}


def constant(value: float = 1.0) -> Callable[[], float]:
    return lambda: value


def trigger(**settings: object) -> EvaluationTrigger:
    metrics = {name: constant() for name in DEPENDENCIES}
    return EvaluationTrigger(DEPENDENCIES, metrics, EvaluationSettings(**settings))


def course(values: Iterable[float], metric: str = "perplexity") -> EvaluationTrigger:
    """One metric with these values in turn, each evaluated."""
    left = iter(values)
    one = EvaluationTrigger({metric: ("all",)}, {metric: lambda: next(left)})
    for step, _ in enumerate(list(values)):
        one.step(step, force=True)
    return one


def test_only_what_depends_on_the_group_runs() -> None:
    one = trigger()
    assert one.step(1) == {}
    one.notify("gates")
    assert one.step(2) == {"perplexity": 1.0, "attention_sparsity": 1.0}
    assert one.step(3) == {}


def test_what_the_budget_has_no_room_for_stays_due() -> None:
    one = trigger(max_evaluations_per_window=1, window_steps=10)
    one.notify("gates"), one.notify("norms")
    # Equally stale: the most important first.
    assert list(one.step(1)) == ["perplexity"]
    assert one.step(9) == {} and one.due == {"attention_sparsity", "adaptive_depth"}
    assert list(one.step(10)) == ["attention_sparsity"]
    assert list(one.step(20)) == ["adaptive_depth"]
    assert not one.due


def test_the_stalest_important_metric_is_first() -> None:
    one = trigger(max_evaluations_per_window=1, window_steps=1)
    one.notify("gates")
    one.step(90)
    one.notify("gates")
    # perplexity 10 steps old at 1.0; attention_sparsity 100 at 0.4.
    assert list(one.step(100)) == ["attention_sparsity"]


def test_age_alone_makes_a_metric_due() -> None:
    one = trigger(staleness_steps=50)
    assert one.step(49) == {}
    assert set(one.step(50)) == set(DEPENDENCIES)
    assert one.step(99) == {}
    never = trigger(staleness_steps=None)
    assert never.step(10_000) == {}


def test_force_runs_all_whatever_the_budget() -> None:
    one = trigger(max_evaluations_per_window=1)
    assert set(one.step(1, force=True)) == set(DEPENDENCIES)


def test_a_metric_that_raises_stays_due() -> None:
    def broken() -> float:
        raise RuntimeError("no data")

    one = EvaluationTrigger({"perplexity": ("all",)}, {"perplexity": broken})
    one.notify("gates")
    with pytest.raises(RuntimeError, match="no data"):
        one.step(1)
    assert one.due == {"perplexity"}


@pytest.mark.parametrize(
    ("metric", "values", "found"),
    [
        ("perplexity", [10, 11, 11, 11], 1),
        ("perplexity", [10, 11, 11, 10, 11, 11], 0),
        ("perplexity", [10, 10.4, 10.4, 10.4], 0),
        ("perplexity", [10, 9, 8, 7], 0),
        ("perplexity", [10, float("nan"), float("inf"), float("nan")], 1),
        ("attention_sparsity", [0.8, 0.5, 0.5, 0.5], 1),
        ("attention_sparsity", [0.5, 0.8, 0.8, 0.8], 0),
    ],
)
def test_a_regression_is_several_worse_values_in_a_row(
    metric: str, values: list[float], found: int
) -> None:
    one = course(values, metric)
    assert len(one.regressions) == found
    if found:
        assert (one.regressions[0].metric, one.regressions[0].step) == (metric, 3)


def test_a_state_in_json_goes_on() -> None:
    one, other = trigger(max_evaluations_per_window=2), trigger(max_evaluations_per_window=2)
    one.notify("gates")
    one.notify("norms")
    one.step(5)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.due == one.due and len(other.due) == 1
    assert other.step(6) == {} and other.state_dict() == one.state_dict()


def test_a_metric_without_dependencies_is_refused() -> None:
    with pytest.raises(ValueError, match="dependencies"):
        EvaluationTrigger({}, {"perplexity": constant()})
    with pytest.raises(ValueError, match="directions"):
        EvaluationSettings(directions={"perplexity": "up"})


def test_a_value_that_was_measured_elsewhere_makes_nothing_else_due() -> None:
    one = trigger(max_evaluations_per_window=2, staleness_steps=None)
    one.record("perplexity", 1, 3.0)
    assert one.due == frozenset() and one.evaluations == 1
    # What was due is done by it, and counts in the window.
    one.notify("gates")
    assert one.due == {"perplexity", "attention_sparsity"}
    one.record("perplexity", 2, 3.0)
    assert set(one.step(3)) == {"attention_sparsity"}
    one.notify("norms")
    assert one.step(4) == {} and one.due == {"perplexity", "adaptive_depth"}
    with pytest.raises(ValueError, match="expected one of"):
        one.record("speed", 1, 0.0)


def test_values_measured_elsewhere_show_regressions() -> None:
    one = trigger(regression_window=2)
    for step, value in enumerate([1.0, 2.0, 2.0]):
        one.record("perplexity", step, value)
    assert [regression.step for regression in one.regressions] == [2]
