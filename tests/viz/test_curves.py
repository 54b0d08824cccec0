"""The legend has the colours of what it names, and heads are counted in whole numbers."""

from __future__ import annotations

from itertools import combinations, pairwise

import pytest
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import Figure

from gravity_hf.viz.curves import score_curves, score_curves_by_layer
from gravity_hf.viz.drawing import Drawing
from gravity_hf.viz.heads import HeadStatistics
from gravity_hf.viz.heatmaps import luminance
from gravity_hf.viz.style import DARK, LIGHT, Theme, drawing_in


def _heads(count: int) -> list[HeadStatistics]:
    distances = (0.5, 1.0, 2.0, 3.0, 5.0)
    return [HeadStatistics("a", i, "force", 1.7, 0.3, distances, 2.0, 0.0) for i in range(count)]


def _built(drawing: Drawing, theme: Theme = LIGHT) -> Figure:
    with drawing_in(theme):
        figure = drawing.build(theme)
        figure.draw_without_rendering()
    return figure


def _luminance(color, paper: str) -> float:
    *parts, alpha = to_rgba(color)
    return luminance(
        [alpha * c + (1 - alpha) * p for c, p in zip(parts, to_rgb(paper), strict=True)]
    )


@pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)
def test_bands_lie_side_by_side_in_colours_told_apart(theme: Theme) -> None:
    figure = _built(score_curves(_heads(1), "0"), theme)
    bands = sorted(figure.axes[0].patches, key=lambda band: band.get_x())
    spans = [(band.get_x(), band.get_x() + band.get_width()) for band in bands]
    assert spans == [pytest.approx(span) for span in ((0.5, 1.0), (1.0, 3.0), (3.0, 5.0))]
    drawn = [band.get_facecolor() for band in bands]
    shown = [handle.get_facecolor() for handle in figure.legends[0].get_patches()]
    assert shown == drawn[:2] and drawn[0] == drawn[2]
    levels = [_luminance(color, theme.paper) for color in (theme.paper, *shown)]
    for one, other in combinations(levels, 2):
        assert (max(one, other) + 0.05) / (min(one, other) + 0.05) > 1.3


@pytest.mark.parametrize("count", [2, 3, 6, 14])
def test_heads_are_counted_in_whole_numbers(count: int) -> None:
    panel, bar = _built(score_curves_by_layer({"a.0": _heads(count)})).axes
    assert panel.get_title() == ""
    ticks = [tick for tick in bar.get_yticks() if 0 <= tick <= count - 1]
    assert len(ticks) >= 2
    assert all(tick == int(tick) for tick in ticks)
    assert all(b > a for a, b in pairwise(ticks))


def test_one_head_needs_no_scale_of_heads() -> None:
    assert len(_built(score_curves_by_layer({"a.0": _heads(1)})).axes) == 1
