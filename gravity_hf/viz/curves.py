"""Score against distance: the law of every head, where its data lie."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .drawing import Drawing
from .heads import HeadStatistics
from .heatmaps import layer_labels
from .style import BLUE, ORANGE, Theme, line_map, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_POINTS = 96
_MOST_LAYERS = 12
_MOST_HEADS = 32
# Opacity of the outer and the inner band.
_BANDS = 0.25, 0.5
_X = "squared distance d²"


def score_curves(heads: Sequence[HeadStatistics], layer: str, title: str | None = None) -> Drawing:
    """The heads of one layer, a panel each: the law, and where 5 to 95 % of the pairs lie.

    Args:
        heads: of one layer; of more than 32 the first 32 are drawn.
        layer: as it is called in the title.
        title: None says which layer and law.
    """
    if not heads:
        raise ValueError("score_curves: expected at least one head, got none")
    shown = heads[:_MOST_HEADS]

    def build(theme: Theme) -> Figure:
        columns = min(len(shown), 4 if len(shown) <= 12 else 8)
        rows = math.ceil(len(shown) / columns)
        width = max(2.5 * columns, 4.5)
        # All four side by side are wider than two panels.
        entries = 4 if columns > 2 else 2
        figure = new_figure(width, 1.9 * rows + 1.4 - 0.1 * entries, title=drawing.title)
        axes = figure.subplots(rows, columns, squeeze=False).flat
        for axis, head in zip(axes, shown, strict=False):
            _draw_head(axis, head, theme)
        for index, axis in enumerate(figure.axes):
            axis.set_visible(index < len(shown))
            if index + columns >= len(shown):
                axis.set_xlabel(_X)
            if index % columns == 0:
                axis.set_ylabel("score (nats)")
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncol=entries, fontsize=8.5)
        return figure

    what = f"How the score falls with distance: layer {layer}, law “{heads[0].law}”"
    drawing = Drawing("score-curves", title or what, "", build)
    return drawing


def score_curves_by_layer(
    layers: Mapping[str, Sequence[HeadStatistics]], title: str = "How the score falls with distance"
) -> Drawing:
    """A panel per layer with all its heads, each from its 5 % to its 95 % quantile of distance.

    Scores are relative to each head's median distance: softmax sees differences only.

    Args:
        layers: heads by the name of their attention module; of many layers 12 are drawn, evenly
            spaced.
        title: above everything.
    """
    if not layers or not all(layers.values()):
        raise ValueError("score_curves_by_layer: expected at least one head per layer, got none")
    labels = dict(zip(layers, layer_labels(list(layers)), strict=True))
    shown = _evenly(list(layers), _MOST_LAYERS)

    def build(theme: Theme) -> Figure:
        from matplotlib.cm import ScalarMappable
        from matplotlib.colors import Normalize
        from matplotlib.ticker import MaxNLocator

        columns = min(len(shown), 4)
        rows = math.ceil(len(shown) / columns)
        figure = new_figure(2.7 * columns + 1.2, 2.1 * rows + 0.9, title=title)
        axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
        most = max(len(layers[name]) for name in shown)
        colors = ScalarMappable(Normalize(0, max(most - 1, 1)), line_map(theme))
        for axis, name in zip(axes.flat, shown, strict=False):
            for head in layers[name]:
                _draw_range(axis, head, colors.to_rgba(head.head))
            axis.set_title(f"layer {labels[name]}")
            axis.grid(axis="y")
        for axis in axes.flat[len(shown) :]:
            axis.set_visible(False)
        if most > 1:
            ticks = MaxNLocator(6, integer=True)
            bar = figure.colorbar(colors, ax=axes, pad=0.015, fraction=0.03, aspect=28, ticks=ticks)
            bar.outline.set_visible(False)
            bar.set_label("head")
        for axis in axes.flat[max(len(shown) - columns, 0) :]:
            axis.set_xlabel(_X)
        figure.supylabel(
            "score minus score\nat the median (nats)", fontsize=9.5, multialignment="center"
        )
        return figure

    return Drawing("score-curves-by-layer", title, "", build)


def curve_of(head: HeadStatistics) -> tuple[Tensor, Tensor]:
    """Squared distances around those that occur, and the head's score there; float64 `[96]`."""
    low, *_, high = head.distances
    margin = 0.3 * max(high - low, 1e-3 * max(high, 1e-6))
    distance_sq = torch.linspace(max(low - margin, 0.0), high + margin, _POINTS).double()
    return distance_sq, head.score(distance_sq)


def _draw_head(axis: Axes, head: HeadStatistics, theme: Theme) -> None:
    distance_sq, score = (values.numpy() for values in curve_of(head))
    low, lower, median, upper, high = head.distances
    # Side by side, not one over the other: the legend shows each colour as it is seen.
    outer, inner = ({"color": BLUE, "linewidth": 0, "alpha": alpha} for alpha in _BANDS)
    axis.axvspan(low, lower, label="5 to 95 % of pairs", **outer)
    axis.axvspan(upper, high, **outer)
    axis.axvspan(lower, upper, label="25 to 75 %", **inner)
    axis.axvline(median, color=theme.ink, linewidth=1.0, linestyle="--", label="median")
    axis.plot(distance_sq, score, color=ORANGE, linewidth=1.8, label="score of the head")
    axis.set_xlim(float(distance_sq[0]), float(distance_sq[-1]))
    axis.set_title(f"head {head.head}: M = {head.mass:.3g}, ε = {head.softening:.3g}", fontsize=8)
    axis.tick_params(labelsize=7.5)
    axis.locator_params(nbins=4)


def _draw_range(axis: Axes, head: HeadStatistics, color: tuple[float, ...]) -> None:
    low, lower, median, upper, high = head.distances

    def line(start: float, end: float) -> tuple[np.ndarray, np.ndarray]:
        distance_sq = torch.linspace(start, end, _POINTS, dtype=torch.float64)
        change = head.score(distance_sq) - head.score(distance_sq.new_tensor(median))
        return distance_sq.numpy(), change.numpy()

    axis.plot(*line(low, high), color=color, linewidth=1.0)
    axis.plot(*line(lower, upper), color=color, linewidth=3.0, solid_capstyle="butt")
    axis.plot([median], [0.0], "o", color=color, markersize=5.5)


def _evenly(names: list[str], most: int) -> list[str]:
    if len(names) <= most:
        return names
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]
