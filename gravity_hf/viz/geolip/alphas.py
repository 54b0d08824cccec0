"""How far attention may move each mode: alpha over the training, with its start and its bounds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..drawing import Drawing
from ..style import GREY, Theme, line_map, new_figure
from .measuring import GeolipSeen

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_LAYERS = 6
# Of the range that was used, above and below it.
_MARGIN = 0.15


def alphas_figure(seen: GeolipSeen) -> Drawing:
    """Alpha of each mode over the steps of the training, a row of panels per layer; where no
    training is known, alpha of each mode as it is."""
    over = " over the training" if seen.history is not None else ""
    title = f"How far attention may move each mode: alpha{over}"
    layers = range(min(len(seen.alphas), _MOST_LAYERS))

    def build(theme: Theme) -> Figure:
        figure = new_figure(8.6, 0.9 + 2.1 * len(layers), title=title)
        rows = figure.subplots(len(layers), 2, squeeze=False, sharex=True)
        for layer, (whole, near) in zip(layers, rows, strict=True):
            for axis in (whole, near):
                _draw(axis, seen, layer, theme)
            whole.axhspan(-0.02 * seen.highest, 0.0, color=GREY, alpha=0.5, linewidth=0)
            whole.axhspan(seen.highest, 1.02 * seen.highest, color=GREY, alpha=0.5, linewidth=0)
            whole.set_ylim(-0.02 * seen.highest, 1.02 * seen.highest)
            near.set_ylim(*_around(seen, layer))
            whole.set_ylabel("alpha")
            whole.set_title(f"layer {layer}, from bound to bound")
            near.set_title(f"layer {layer}, magnified")
        for axis in rows[-1]:
            axis.set_xlabel("step" if seen.history is not None else "mode")
        if seen.history is not None and seen.alphas.shape[1] > 1:
            _number_modes(figure, rows, seen.alphas.shape[1], theme)
        return figure

    left_out = len(seen.alphas) - len(layers)
    caption = (
        f"Dashed: the start, {seen.start:.4g}. Grey edges: the bounds, 0 and {seen.highest:g}. "
        "One that rises may say that attention is used, or may be drift: alpha alone cannot tell, "
        "the gain of attention in the verdict can."
    )
    if left_out:
        caption += f" {left_out} more layers are not shown."
    return Drawing("alphas", title, caption, build)


def _draw(axis: Axes, seen: GeolipSeen, layer: int, theme: Theme) -> None:
    modes = seen.alphas.shape[1]
    colors = line_map(theme)
    if seen.history is None:
        values = seen.alphas[layer].numpy()
        axis.vlines(range(modes), seen.start, values, color=GREY, linewidth=1.0)
        axis.scatter(range(modes), values, c=range(modes), cmap=colors, s=18, zorder=3)
    else:
        steps = seen.history.steps.numpy()
        # A history of one point is a point.
        marker = "o" if len(steps) == 1 else None
        for mode in range(modes):
            color = colors(mode / max(modes - 1, 1))
            values = seen.history.alphas[:, layer, mode].numpy()
            axis.plot(steps, values, color=color, linewidth=1.2, marker=marker)
    axis.axhline(seen.start, color=theme.ink, linewidth=1.0, linestyle="--")
    axis.grid(axis="y", color=theme.grid)
    axis.set_axisbelow(True)


def _around(seen: GeolipSeen, layer: int) -> tuple[float, float]:
    """Ends of an axis that shows the start and every alpha of a layer."""
    values: Tensor = seen.alphas[layer]
    if seen.history is not None:
        values = seen.history.alphas[:, layer]
    low, high = min(float(values.min()), seen.start), max(float(values.max()), seen.start)
    margin = max(_MARGIN * (high - low), 1e-3 * seen.highest)
    return low - margin, high + margin


def _number_modes(figure: Figure, rows: object, modes: int, theme: Theme) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import MaxNLocator

    colors = ScalarMappable(Normalize(0, modes - 1), line_map(theme))
    ticks = MaxNLocator(6, integer=True)
    bar = figure.colorbar(colors, ax=rows, pad=0.015, fraction=0.03, aspect=28, ticks=ticks)
    bar.outline.set_visible(False)
    bar.set_label("mode")
