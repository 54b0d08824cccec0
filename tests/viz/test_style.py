"""Everything stands out from its paper: text 7 to 1, lines and markers 3 to 1, as WCAG asks."""

from __future__ import annotations

import pytest
from matplotlib import colormaps
from matplotlib.colors import to_rgb

from gravity_hf.viz import style
from gravity_hf.viz.heatmaps import luminance, readable_on
from gravity_hf.viz.style import COLORS, DARK, LIGHT, Theme, change_map, line_map, themes_of

THEMES = pytest.mark.parametrize("theme", [LIGHT, DARK], ids=lambda theme: theme.name)


def contrast(one, other) -> float:
    light, dark = sorted((luminance(to_rgb(one)), luminance(to_rgb(other))), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_luminance_is_that_of_the_standard() -> None:
    assert contrast("#ffffff", "#000000") == pytest.approx(21.0)
    assert contrast("#777777", "#ffffff") == pytest.approx(4.48, abs=0.01)


@THEMES
def test_text_and_lines_stand_out_from_the_paper(theme: Theme) -> None:
    assert contrast(theme.ink, theme.paper) >= 7.0
    for color in COLORS:
        assert contrast(color, theme.paper) >= 3.0
    colors = line_map(theme)
    assert all(contrast(colors(i / 20)[:3], theme.paper) >= 3.0 for i in range(21))


@THEMES
def test_numbers_in_cells_stand_out_from_every_colour(theme: Theme) -> None:
    for name in (style.MASS_MAP, style.CONTRAST_MAP, change_map(theme)):
        colors = colormaps[name] if isinstance(name, str) else name
        cells = [colors(i / 100)[:3] for i in range(101)]
        assert all(contrast(cell, readable_on(cell)) >= 4.5 for cell in cells)


def test_themes_are_not_alike() -> None:
    assert LIGHT.ink != DARK.ink
    assert themes_of("both") == (LIGHT, DARK)
    with pytest.raises(ValueError, match="'light', 'dark', 'both'"):
        themes_of("sepia")
