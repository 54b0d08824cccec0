"""Curves of training: losses, and the norm of the gradient below them where it was logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from .drawing import Drawing
from .histories import LossPanel, TrainingCurve
from .style import BLUE, COLORS, Theme, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Steps that an average is over at least, and averages that a run is long.
_FEWEST_STEPS, _AVERAGES = 10, 40
# An average over most of a run would show what is in no data.
_SHORTEST_RUN = 4 * _FEWEST_STEPS
# Few logged values are shown as such.
_MOST_MARKED = 40


def loss_curves(panels: Sequence[LossPanel], title: str | None = None) -> Drawing:
    """One column per panel; a second row with gradient norms where any curve has them.

    Curves are moving averages over a fortieth of the run, at least ten steps; the logged values
    stay visible behind them. Where that is no more than one logged value, or the run is shorter
    than forty steps, these are the curve.
    Where a panel has several curves, the first is the one to compare with: wide and pale.
    """
    if not panels or not all(panel.curves for panel in panels):
        raise ValueError(f"loss_curves: expected at least one curve per panel, got {panels!r}")

    def build(theme: Theme) -> Figure:
        has_norms = any(c.gradient_norms for panel in panels for c in panel.curves.values())
        rows = 2 if has_norms else 1
        figure = new_figure(4.9 * len(panels), 3.9 + 2.5 * (rows - 1), title=title)
        grid = figure.subplots(
            rows, len(panels), squeeze=False, height_ratios=[3, 2][:rows], sharex="col"
        )
        for column, panel in enumerate(panels):
            _draw_losses(grid[0][column], panel)
            if has_norms:
                _draw_norms(grid[1][column], panel.curves)
            grid[-1][column].set_xlabel("optimiser step")
            if len(panel.curves) > 1:
                below = {"loc": "upper center", "bbox_to_anchor": (0.5, -0.22), "ncol": 2}
                names = grid[0][column].get_legend_handles_labels()
                grid[-1][column].legend(*names, fontsize=8.5, **below)
        return figure

    what = "Loss curves: " + ", ".join(panel.title for panel in panels)
    return Drawing("losses", title or what, "", build)


def smoothing_weight(steps: Sequence[int]) -> float:
    """Weight of `smoothed` that averages over a fortieth of the run, at least ten steps; 0, which
    averages nothing, where so many steps have one logged value, or the run less than forty."""
    run = steps[-1] - steps[0]
    if run + 1 < _SHORTEST_RUN:
        return 0.0
    interval = run / (len(steps) - 1)
    window = max(_FEWEST_STEPS, run / _AVERAGES) / interval
    return 1.0 - 1.0 / max(window, 1.0)


def smoothed(losses: Sequence[float], weight: float) -> list[float]:
    """Exponential moving average without the bias towards its start."""
    average, total, result = 0.0, 0.0, []
    for loss in losses:
        average = weight * average + (1.0 - weight) * loss
        total = weight * total + (1.0 - weight)
        result.append(average / total)
    return result


def _draw_losses(axis: Axes, panel: LossPanel) -> None:
    values = {name: (curve.steps, curve.losses) for name, curve in panel.curves.items()}
    _draw_curves(axis, values)
    axis.set_title(panel.title)
    axis.set_ylabel(panel.label)


def _draw_norms(axis: Axes, curves: Mapping[str, TrainingCurve]) -> None:
    values = {
        name: (curve.steps, curve.gradient_norms or (float("nan"),) * len(curve.steps))
        for name, curve in curves.items()
    }
    _draw_curves(axis, values)
    axis.set_yscale("log")
    _plain_decades(axis)
    axis.set_ylabel("gradient norm\n(before clipping)")


def _plain_decades(axis: Axes) -> None:
    """Ticks such as 0.2 and 0.5 in place of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    low, high = axis.get_ylim()
    within = (1.0, 2.0, 3.0, 5.0) if high < 30 * low else (1.0,)
    axis.yaxis.set_major_locator(LogLocator(subs=within, numticks=9))
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def _draw_curves(axis: Axes, curves: Mapping[str, tuple[Sequence[int], Sequence[float]]]) -> None:
    for index, (name, (steps, values)) in enumerate(curves.items()):
        color = BLUE if len(curves) == 1 else COLORS[index % len(COLORS)]
        look: dict[str, Any] = {"color": color, "linewidth": 1.8}
        if len(curves) > 1 and index == 0:
            look |= {"linewidth": 5.0, "alpha": 0.6, "solid_capstyle": "round"}
        weight = smoothing_weight(steps)
        if weight > 0.0:
            axis.plot(steps, values, color=color, linewidth=0.6, alpha=0.4)
        elif len(steps) <= _MOST_MARKED:
            look |= {"marker": "o", "markersize": 2.0 + look["linewidth"]}
        axis.plot(steps, smoothed(values, weight), label=name, **look)
    axis.grid(axis="y")
