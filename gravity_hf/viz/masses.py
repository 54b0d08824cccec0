"""The masses of a model, as numbers and as heatmaps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

from ..integration.hosts import gravity_modules
from .drawing import Drawing
from .heatmaps import Grid, draw_heatmaps
from .style import MASS_MAP, Theme, change_map

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Masses = list[list[float]]


def masses_by_layer(model: nn.Module) -> Masses:
    """Mass of every query head, one list per converted layer; empty for an unpatched model."""
    return [module().mass.tolist() for module in gravity_modules(model).values()]


def mass_heatmaps(
    panels: Mapping[str, Grid], layers: Sequence[str] | None = None, title: str | None = None
) -> Drawing:
    """One heatmap per entry of `panels`, all on one logarithmic colour scale.

    Args:
        panels: title of each and `[layers][heads]` masses.
        layers: names of the rows; their indices if None.
        title: above everything; none if None.
    """
    if not panels or not all(panels.values()):
        raise ValueError(f"mass_heatmaps: expected at least one mass per panel, got {panels!r}")

    def build(theme: Theme) -> Figure:
        from matplotlib.colors import LogNorm

        values = _varied(panels)
        low = max(min(values), 1e-6)
        return draw_heatmaps(
            panels,
            label="mass M",
            # One value alone has no range; a scale needs one.
            norm=LogNorm(low, max(max(values), low * 1.01)),
            colors=MASS_MAP,
            write=_short,
            layers=layers,
            title=title,
        )

    what = "Mass of every head: " + ", ".join(panels)
    return Drawing("masses", title or what, "", build)


def mass_change(
    before: Grid, after: Grid, layers: Sequence[str] | None = None, title: str = "Change of mass"
) -> Drawing:
    """How far training moved every mass, in percent of what it was; grids of one shape."""
    change = [
        [100.0 * (new / old - 1.0) for old, new in zip(*rows, strict=True)]
        for rows in zip(before, after, strict=True)
    ]

    def build(theme: Theme) -> Figure:
        from matplotlib.colors import Normalize

        reach = max(0.1, *(abs(value) for row in change for value in row))
        return draw_heatmaps(
            {title: change},
            label="change of mass M, %",
            norm=Normalize(-reach, reach),
            colors=change_map(theme),
            write=lambda value: f"{value:+.{0 if reach >= 20 else 1 if reach >= 2 else 2}f}",
            layers=layers,
            title=title,
        )

    return Drawing("mass-change", title, "", build)


def _varied(panels: Mapping[str, Grid]) -> list[float]:
    """The masses that the scale is for. One constant far from all others would take up most of it,
    and leave those that differ in one colour."""
    grids = [[mass for row in grid for mass in row] for grid in panels.values()]
    varied = [masses for masses in grids if max(masses) > min(masses)]
    return [mass for masses in varied or grids for mass in masses]


def _short(mass: float) -> str:
    return f"{mass:.2f}" if mass < 10 else f"{mass:.1f}" if mass < 100 else f"{mass:.0f}"
