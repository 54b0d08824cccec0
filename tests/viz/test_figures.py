"""Figures are SVG elements that take their ink from the page and fetch nothing."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest
from hosts import tiny_host

from gravity_hf import GravityConfig, patch_with_gravity
from gravity_hf.viz import style
from gravity_hf.viz.losses import loss_curves, smoothed
from gravity_hf.viz.masses import mass_heatmaps, masses_by_layer

MASSES = {
    "before": [[1.0, 2.0, 3.0], [4.0, 50.0, 600.0]],
    "after": [[1.0, 2.5, 3.0], [4.0, 5.0, 6.0]],
}
LOSSES = {"training": {"host": [3.0, 2.0, 1.0]}, "healing": {"a": [2.0, 1.5], "b": [1.0, 0.9]}}

FIGURES = {"masses": lambda: mass_heatmaps(MASSES), "losses": lambda: loss_curves(LOSSES)}


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES.keys())
def test_figure_is_a_lone_svg_element(draw) -> None:
    svg = draw()
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert svg.startswith("<svg")
    links = re.findall(r'href="([^"]*)"', svg)
    assert all(link.startswith(("#", "data:")) for link in links)


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES.keys())
def test_figure_takes_its_ink_from_the_page(draw) -> None:
    svg = draw()
    assert "currentColor" in svg
    assert style.INK not in svg


@pytest.mark.parametrize("draw", FIGURES.values(), ids=FIGURES.keys())
def test_figure_is_deterministic(draw) -> None:
    assert draw() == draw()


def test_figures_of_one_page_share_no_ids() -> None:
    first, second = (re.findall(r'\bid="([^"]*)"', draw()) for draw in FIGURES.values())
    assert set(first).isdisjoint(second)
    for svg in (draw() for draw in FIGURES.values()):
        used = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', svg)
        assert {a or b for a, b in used} <= set(re.findall(r'\bid="([^"]*)"', svg))


def test_heatmap_shows_titles_and_values() -> None:
    svg = mass_heatmaps(MASSES)
    for text in ("before", "after", "2.50", "50.0", "600"):
        assert f">{text}<" in svg


def test_heatmap_of_equal_masses_has_a_scale() -> None:
    assert "<svg" in mass_heatmaps({"one": [[0.97, 0.97]]})


def test_heatmap_of_layers_of_different_width() -> None:
    assert "<svg" in mass_heatmaps({"mixed": [[1.0, 2.0], [3.0]]})


def test_empty_figures_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one mass"):
        mass_heatmaps({"none": []})
    with pytest.raises(ValueError, match="at least one curve"):
        loss_curves({})


def test_masses_are_read_layer_by_layer() -> None:
    host = tiny_host("qwen2")
    assert masses_by_layer(host) == []
    masses = masses_by_layer(patch_with_gravity(host, GravityConfig()))
    assert [len(row) for row in masses] == [6, 6, 6]
    assert masses[0][0] == pytest.approx(0.9741, abs=1e-4)


def test_smoothing_has_no_bias_at_its_start() -> None:
    assert smoothed([2.0, 2.0, 2.0], 0.9) == pytest.approx([2.0, 2.0, 2.0])
    assert smoothed([1.0, 3.0], 0.0) == [1.0, 3.0]


def test_missing_matplotlib_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(style.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install"):
        loss_curves(LOSSES)
