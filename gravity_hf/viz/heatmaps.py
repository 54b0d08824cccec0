"""One number per head as a heatmap, layers down, heads across."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from .style import GREY, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure

# `[layers][heads]`; layers may differ in their heads.
Grid = Sequence[Sequence[float]]

# Numbers in the cells stay readable up to here.
_MAX_WRITTEN = 200
_MAX_TICKS = 16


def layer_labels(names: Sequence[str]) -> list[str]:
    """Short names of attention modules: their number in the model where it tells them apart, else
    their place among the converted ones."""
    numbers = [next((p for p in reversed(n.split(".")) if p.isdigit()), "") for n in names]
    told_apart = all(numbers) and len(set(numbers)) == len(numbers)
    return numbers if told_apart else [str(i) for i in range(len(names))]


def draw_heatmaps(
    panels: Mapping[str, Grid],
    *,
    label: str,
    norm: Normalize,
    colors: str | Colormap,
    write: Callable[[float], str],
    layers: Sequence[str] | None = None,
    title: str | None = None,
) -> Figure:
    """One panel per entry, all on one scale.

    Args:
        panels: title of each panel and its values.
        label: of the colour bar, with the unit.
        norm: value to place on the colour map.
        colors: a colour map or its name.
        write: a value as it stands in its cell.
        layers: names of the rows; their indices if None.
        title: above everything.
    """
    rows = max(len(grid) for grid in panels.values())
    heads = max(len(row) for grid in panels.values() for row in grid)
    width = min(max(2.5, 0.7 + 0.42 * heads), 6.2) * len(panels) + 0.9
    is_written = heads * rows <= _MAX_WRITTEN
    height = 1.35 + min(0.42 * max(rows, 2), 7.2)
    figure = new_figure(width, height, title=title)
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (name, grid) in zip(axes, panels.items(), strict=True):
        mesh = _draw_panel(axis, grid, norm, colors)
        if len(panels) > 1:
            axis.set_title(name + ("" if is_written else _constant(grid, write)))
        _label_ticks(axis.set_xticks, [str(i) for i in range(heads)])
        if is_written:
            _write_values(axis, grid, mesh, write)
    axes[0].invert_yaxis()
    axes[0].set_ylabel("layer")
    _label_ticks(axes[0].set_yticks, list(layers or map(str, range(rows))))
    bar = figure.colorbar(
        mesh,
        ax=list(axes),
        pad=0.015,
        fraction=0.035,
        aspect=28,
        extend=_extends([v for grid in panels.values() for row in grid for v in row], norm),
    )
    bar.outline.set_visible(False)
    bar.set_label(label)
    _plain_numbers(bar)
    return figure


def _extends(values: Sequence[float], norm: Normalize) -> Literal["neither", "both", "min", "max"]:
    """Arrows on the colour bar where values lie beyond it."""
    slack = 1e-3 * max(abs(norm.vmin), abs(norm.vmax))
    below, above = min(values) < norm.vmin - slack, max(values) > norm.vmax + slack
    if below and above:
        return "both"
    return "min" if below else "max" if above else "neither"


def _constant(grid: Grid, write: Callable[[float], str]) -> str:
    """What a panel of one colour says in its title, where its cells have no room for it."""
    values = {value for row in grid for value in row}
    return f": {write(values.pop())} everywhere" if len(values) == 1 else ""


def _draw_panel(axis: Axes, grid: Grid, norm: Normalize, colors: str | Colormap) -> QuadMesh:
    heads = max(len(row) for row in grid)
    # Models may mix layers of different width; the gap stays empty.
    cells = [list(row) + [math.nan] * (heads - len(row)) for row in grid]
    mesh = axis.pcolormesh(cells, cmap=colors, norm=norm, edgecolors="none")
    # What lies beyond the scale is no shade of it.
    mesh.set_cmap(mesh.get_cmap().with_extremes(under=GREY, over=GREY))
    axis.set_xlabel("head")
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.tick_params(length=0)
    return mesh


def _label_ticks(set_ticks: Callable[..., object], labels: Sequence[str]) -> None:
    step = max(1, math.ceil(len(labels) / _MAX_TICKS))
    shown = range(0, len(labels), step)
    set_ticks([i + 0.5 for i in shown], [labels[i] for i in shown])


def _plain_numbers(bar: Any) -> None:
    """Ticks as 2 and 50, also where a logarithmic scale would write powers of ten, or nothing."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

    if bar.norm.vmax < 30 * max(bar.norm.vmin, 1e-9):
        bar.locator = MaxNLocator(5)
    bar.formatter = FuncFormatter(lambda value, _: f"{value:g}")
    bar.update_ticks()
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.ax.minorticks_off()


def _write_values(axis: Axes, grid: Grid, mesh: QuadMesh, write: Callable[[float], str]) -> None:
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            color = readable_on(mesh.to_rgba(value)[:3])
            place = {"ha": "center", "va": "center", "color": color, "fontsize": 8}
            axis.text(x + 0.5, y + 0.5, write(value), **place)


def readable_on(color: Sequence[float]) -> str:
    """Ink for text on a colour given as red, green, blue between 0 and 1: at least 4.5 to 1."""
    return "#000000" if luminance(color) > 0.179 else "#ffffff"


def luminance(color: Sequence[float]) -> float:
    """Relative luminance of WCAG 2.2, 0 (black) to 1 (white)."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue
