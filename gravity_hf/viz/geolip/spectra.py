"""Spectra of tokens before and after attention: over all tokens by mode, and of one sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..drawing import Drawing
from ..style import BLUE, GREY, MASS_MAP, ORANGE, Theme, change_map, new_figure
from .measuring import GeolipSeen

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
# Beside each other, in modes.
_APART = 0.18
_MOST_ROWS = 64


def spectra_figure(seen: GeolipSeen) -> Drawing:
    """Of each mode, where it lies over the tokens before and after attention, and its change."""
    title = "The spectrum of the tokens, before and after attention"
    change = 100 * (seen.after / seen.before.clamp(min=1e-12) - 1)

    def build(theme: Theme) -> Figure:
        modes = seen.before.shape[1]
        figure = new_figure(min(max(6.4, 0.32 * modes + 1.6), 12.0), 5.2, title=title)
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
        _bands(top, seen.before, -_APART, GREY, "as the lens gives it")
        _bands(top, seen.after, _APART, BLUE, "after all spectral layers")
        top.set_ylabel("omega (length of a column)")
        bottom.axhline(0.0, color=theme.ink, linewidth=0.8)
        _bands(bottom, change, 0.0, ORANGE, None)
        bottom.set_ylabel("change (%)")
        bottom.set_xlabel("mode")
        bottom.locator_params(axis="x", integer=True)
        for axis in (top, bottom):
            axis.grid(axis="y", color=theme.grid)
            axis.set_axisbelow(True)
        figure.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncol=2)
        return figure

    caption = (
        f"{len(seen.before):,} tokens. Thin lines reach from 5 to 95 % of the tokens, thick ones "
        "from 25 to 75 %, points are medians. Below: by how much attention changed each mode."
    )
    return Drawing("spectra", title, caption, build)


def sample_spectra_figure(seen: GeolipSeen) -> Drawing:
    """Of the first sample, tokens down and modes across: before, after, and the change."""
    title = "The spectra of one sample"
    count = min(seen.first, _MOST_ROWS)
    before, after = seen.before[:count], seen.after[:count]
    change = 100 * (after / before.clamp(min=1e-12) - 1)

    def build(theme: Theme) -> Figure:
        height = min(max(3.0, 0.085 * count + 1.4), 5.4)
        figure = new_figure(9.4, height, title=title)
        axes = figure.subplots(1, 3, sharey=True)
        low = float(torch.minimum(before, after).min())
        high = float(torch.maximum(before, after).max())
        first = _heat(axes[0], before, "before", MASS_MAP, low, high)
        _heat(axes[1], after, "after", MASS_MAP, low, high)
        # Of a model without spectral layers nothing changes.
        most = max(float(change.abs().max()), 1e-6)
        last = _heat(axes[2], change, "change", change_map(theme), -most, most)
        axes[0].set_ylabel("token")
        for axis, mesh, unit in ((axes[1], first, "omega"), (axes[2], last, "%")):
            bar = figure.colorbar(mesh, ax=axis, aspect=30)
            bar.outline.set_visible(False)
            bar.ax.set_title(unit, loc="center", fontsize=9.5)
        return figure

    left_out = f", of which the first {count} are shown" if count < seen.first else ""
    caption = (
        f"{seen.first:,} tokens of one sample{left_out}; omega is the length of a column of the "
        "lifted frame. Before and after share their colours; a column of one colour in the change "
        "says that attention scales a mode alike for all tokens."
    )
    return Drawing("spectra-sample", title, caption, build)


def _bands(axis: Axes, values: Tensor, shift: float, color: str, label: str | None) -> None:
    """Of each column two lines and a point: 5 to 95 %, 25 to 75 %, median."""
    # Not torch.quantile, which takes no more than 16 million numbers.
    low, lower, median, upper, high = np.quantile(values.numpy(), _QUANTILES, axis=0)
    where = torch.arange(values.shape[1]).numpy() + shift
    wide = max(1.6, min(5.0, 90 / values.shape[1]))
    axis.vlines(where, low, high, color=color, linewidth=1.0)
    axis.vlines(where, lower, upper, color=color, linewidth=wide, label=label)
    axis.plot(where, median, "o", color=color, markersize=wide * 0.9 + 1.2)


def _heat(
    axis: Axes, values: Tensor, title: str, colors: object, low: float, high: float
) -> object:
    mesh = axis.imshow(
        values.numpy(), aspect="auto", cmap=colors, vmin=low, vmax=high, interpolation="nearest"
    )
    axis.set_title(title)
    axis.set_xlabel("mode")
    axis.locator_params(integer=True)
    for spine in axis.spines.values():
        spine.set_visible(False)
    return mesh
