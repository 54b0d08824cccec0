"""Loss curves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .style import COLORS, figure_svg, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@styled
def loss_curves(panels: dict[str, dict[str, list[float]]], unit: str = "nats per byte") -> str:
    """SVG with one axis per entry of `panels`, which maps a title to named losses, one per step.

    Curves are moving averages; the raw losses stay visible behind them where an axis has one curve
    only. Where it has several, the first is the one to compare with: wide and pale.
    """
    if not panels or not all(panels.values()):
        raise ValueError(f"loss_curves: expected at least one curve per panel, got {panels!r}")
    figure = new_figure(4.9 * len(panels), 3.8)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        _draw_curves(axis, curves)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.set_ylabel(f"training loss, {unit}")
        axis.grid(axis="y", alpha=0.18, linewidth=0.6)
    return figure_svg(figure, "losses", "Loss curves: " + ", ".join(panels))


def smoothed(losses: list[float], weight: float) -> list[float]:
    """Exponential moving average without the bias towards its start."""
    average, total, result = 0.0, 0.0, []
    for loss in losses:
        average = weight * average + (1.0 - weight) * loss
        total = weight * total + (1.0 - weight)
        result.append(average / total)
    return result


def _draw_curves(axis: Axes, curves: dict[str, list[float]]) -> None:
    for index, (name, losses) in enumerate(curves.items()):
        steps = range(1, len(losses) + 1)
        # A fortieth of the run, at least ten steps.
        weight = 1.0 - 1.0 / max(10, len(losses) // 40)
        look = {"color": COLORS[index % len(COLORS)], "linewidth": 1.8}
        if len(curves) == 1:
            axis.plot(steps, losses, color=COLORS[0], linewidth=0.5, alpha=0.35)
            look["color"] = COLORS[4]
        elif index == 0:
            look |= {"linewidth": 5.0, "alpha": 0.5, "solid_capstyle": "round"}
        axis.plot(steps, smoothed(losses, weight), label=name, **look)
    if len(curves) > 1:
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.2), ncol=2, fontsize=8.5)
