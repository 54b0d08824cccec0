"""How much nearer near keys are than far ones, for the law, as heatmaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from .drawing import Drawing
from .heatmaps import Grid, draw_heatmaps
from .style import CONTRAST_MAP, Theme

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def contrast_heatmaps(
    panels: Mapping[str, Grid],
    layers: Sequence[str] | None = None,
    title: str = "Contrast of every head",
) -> Drawing:
    """One heatmap per entry of `panels`, all on one logarithmic colour scale from 1 upwards.

    Args:
        panels: title of each and `[layers][heads]` contrasts, `((d2_95 + eps) / (d2_05 + eps))^2`.
        layers: names of the rows; their indices if None.
        title: above everything.
    """
    if not panels or not all(panels.values()):
        raise ValueError(f"contrast_heatmaps: expected at least one head per panel, got {panels!r}")

    def build(theme: Theme) -> Figure:
        from matplotlib.colors import LogNorm

        highest = max(value for grid in panels.values() for row in grid for value in row)
        return draw_heatmaps(
            panels,
            label="contrast (1 = none)",
            norm=LogNorm(1.0, max(highest, 1.05)),
            colors=CONTRAST_MAP,
            write=lambda value: f"{value:.2f}" if value < 10 else f"{value:.3g}",
            layers=layers,
            title=title,
        )

    return Drawing("contrast", title, "", build)
