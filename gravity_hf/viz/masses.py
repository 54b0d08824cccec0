"""The masses of a model as numbers and as heatmaps, layers down, heads across."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch import nn

from ..integration.hosts import gravity_modules
from .style import figure_svg, new_figure, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.colors import LogNorm

Masses = list[list[float]]

_MAX_LABELLED = 200


def masses_by_layer(model: nn.Module) -> Masses:
    """Mass of every query head, one list per converted layer; empty for an unpatched model."""
    return [module().mass.tolist() for module in gravity_modules(model).values()]


@styled
def mass_heatmaps(panels: dict[str, Masses]) -> str:
    """SVG with one heatmap per entry of `panels`, all on one logarithmic colour scale."""
    from matplotlib.colors import LogNorm

    if not panels or not all(panels.values()):
        raise ValueError(f"mass_heatmaps: expected at least one mass per panel, got {panels!r}")
    values = [mass for masses in panels.values() for row in masses for mass in row]
    low, high = min(values), max(values)
    # One value alone has no range; a scale needs one.
    norm = LogNorm(max(low, 1e-6), max(high, max(low, 1e-6) * 1.01))
    rows = max(len(masses) for masses in panels.values())
    figure = new_figure(3.1 * len(panels) + 0.6, 1.1 + 0.42 * min(rows, 24))
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, masses) in zip(axes, panels.items(), strict=True):
        mesh = _draw_panel(axis, title, masses, norm)
    bar = figure.colorbar(mesh, ax=list(axes), pad=0.015, fraction=0.035)
    bar.outline.set_visible(False)
    bar.set_label("mass M")
    description = "Mass of every head: " + ", ".join(panels)
    return figure_svg(figure, "masses", description)


def _draw_panel(axis: Axes, title: str, masses: Masses, norm: LogNorm) -> QuadMesh:
    heads = max(len(row) for row in masses)
    # Models may mix layers of different width; the gap stays empty.
    grid = [row + [math.nan] * (heads - len(row)) for row in masses]
    mesh = axis.pcolormesh(grid, cmap="viridis", norm=norm, edgecolors="none")
    axis.invert_yaxis()
    axis.set_title(title)
    axis.set_xlabel("head")
    axis.set_ylabel("layer")
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.tick_params(length=0)
    _label_ticks(axis.set_xticks, heads)
    _label_ticks(axis.set_yticks, len(masses))
    if heads * len(masses) <= _MAX_LABELLED:
        _write_values(axis, masses, norm)
    return mesh


def _label_ticks(set_ticks: Callable[..., object], count: int) -> None:
    step = max(1, math.ceil(count / 12))
    shown = range(0, count, step)
    set_ticks([i + 0.5 for i in shown], [str(i) for i in shown])


def _write_values(axis: Axes, masses: Masses, norm: LogNorm) -> None:
    for y, row in enumerate(masses):
        for x, mass in enumerate(row):
            # The upper end of the colour map is bright yellow, the lower dark violet.
            color = "#111418" if norm(mass) > 0.6 else "#f4f5f7"
            axis.text(
                x + 0.5, y + 0.5, _short(mass), ha="center", va="center", color=color, fontsize=8
            )


def _short(mass: float) -> str:
    return f"{mass:.2f}" if mass < 10 else f"{mass:.1f}" if mass < 100 else f"{mass:.0f}"
