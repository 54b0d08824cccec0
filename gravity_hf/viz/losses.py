"""Curves of training: losses, and the norm of the gradient below them where it was logged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .drawing import Drawing
from .histories import LossPanel, TrainingCurve
from .style import BLUE, COLORS, Theme, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def loss_curves(panels: Sequence[LossPanel], title: str | None = None) -> Drawing:
    """One column per panel; a second row with gradient norms where any curve has them.

    Curves are moving averages; the raw values stay visible behind them where a panel has one curve
    only. Where it has several, the first is the one to compare with: wide and pale.
    """
    if not panels or not all(panel.curves for panel in panels):
        raise ValueError(f"loss_curves: expected at least one curve per panel, got {panels!r}")

    def build(theme: Theme) -> Figure:
        has_norms = any(c.gradient_norms for panel in panels for c in panel.curves.values())
        rows = 2 if has_norms else 1
        figure = new_figure(4.9 * len(panels), 3.9 + 2.5 * (rows - 1))
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
        if title:
            figure.suptitle(title, x=0.01, ha="left")
        return figure

    what = "Loss curves: " + ", ".join(panel.title for panel in panels)
    return Drawing("losses", title or what, "", build)


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
        # A fortieth of the run, at least ten steps.
        weight = 1.0 - 1.0 / max(10, len(values) // 40)
        look = {"color": COLORS[index % len(COLORS)], "linewidth": 1.8}
        if len(curves) == 1:
            axis.plot(steps, values, color=COLORS[0], linewidth=0.5, alpha=0.35)
            look["color"] = BLUE
        elif index == 0:
            look |= {"linewidth": 5.0, "alpha": 0.6, "solid_capstyle": "round"}
        axis.plot(steps, smoothed(values, weight), label=name, **look)
    axis.grid(axis="y")
