"""Averages are over steps, not over entries of the log, and hide no logged value."""

from __future__ import annotations

import pytest

from gravity_hf.viz.histories import LossPanel, TrainingCurve
from gravity_hf.viz.losses import loss_curves, smoothed, smoothing_weight
from gravity_hf.viz.style import LIGHT, drawing_in


def _lines(*curves: TrainingCurve) -> list[list[float]]:
    panel = LossPanel("training", {f"run {i}": curve for i, curve in enumerate(curves)})
    with drawing_in(LIGHT):
        return [list(line.get_ydata()) for line in loss_curves([panel]).build(LIGHT).axes[0].lines]


def _zigzag(count: int, every: int) -> TrainingCurve:
    steps = tuple(every * (i + 1) for i in range(count))
    return TrainingCurve(steps, tuple(2.0 + (-1.0) ** i for i in range(count)))


@pytest.mark.parametrize(
    ("count", "every", "values"),
    [(400, 1, 10), (2000, 1, 50), (80, 5, 2), (401, 10, 10)],
    ids=["ten-steps", "a-fortieth", "every-fifth", "every-tenth"],
)
def test_an_average_is_over_steps(count: int, every: int, values: int) -> None:
    """`1 / (1 - weight)` is the number of logged values that count."""
    weight = smoothing_weight(_zigzag(count, every).steps)
    assert 1.0 / (1.0 - weight) == pytest.approx(values, rel=1e-2)


@pytest.mark.parametrize(("count", "every"), [(10, 10), (40, 10), (10, 1), (3, 50), (1, 7)])
def test_few_values_are_shown_as_they_were_logged(count: int, every: int) -> None:
    curve = _zigzag(count, every)
    assert _lines(curve) == [pytest.approx(list(curve.losses))]


def test_logged_values_stay_visible_behind_every_average() -> None:
    long, other = _zigzag(60, 1), _zigzag(80, 1)
    lines = _lines(long, other)
    assert [len(line) for line in lines] == [60, 60, 80, 80]
    assert lines[0] == list(long.losses) and lines[2] == list(other.losses)
    for raw, average in (lines[:2], lines[2:]):
        assert max(average[20:]) - min(average[20:]) < 0.5 < max(raw) - min(raw)


def test_smoothing_has_no_bias_at_its_start() -> None:
    assert smoothed([2.0, 2.0, 2.0], 0.9) == pytest.approx([2.0, 2.0, 2.0])
    assert smoothed([1.0, 3.0], 0.0) == [1.0, 3.0]
