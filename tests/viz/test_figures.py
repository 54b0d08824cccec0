"""Figures say what they show, are the same every time, and leave the ink to a page that has one."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable

import matplotlib
import pytest
from hosts import tiny_host

from gravity_hf import GravityConfig, patch_with_gravity
from gravity_hf.viz import style
from gravity_hf.viz.drawing import Drawing
from gravity_hf.viz.figures import figures_of
from gravity_hf.viz.heatmaps import layer_labels
from gravity_hf.viz.histories import LossPanel, TrainingCurve
from gravity_hf.viz.losses import loss_curves
from gravity_hf.viz.masses import mass_change, mass_heatmaps, masses_by_layer
from gravity_hf.viz.style import DARK, INK, LIGHT
from gravity_hf.viz.tokens import token_labels

MASSES = {
    "before": [[1.0, 2.0, 3.0], [4.0, 50.0, 600.0]],
    "after": [[1.0, 2.5, 3.0], [4.0, 5.0, 6.0]],
}
CURVE = TrainingCurve.of_losses([3.0, 2.0, 1.0])
PANELS = [LossPanel("training", {"host": CURVE}), LossPanel("healing", {"a": CURVE, "b": CURVE})]

INLINE: dict[str, Callable[[], Drawing]] = {
    "masses": lambda: mass_heatmaps(MASSES),
    "losses": lambda: loss_curves(PANELS),
}
inline = pytest.mark.parametrize("draw", INLINE.values(), ids=INLINE.keys())

# What each figure of the whole set has written on it, title first.
WRITTEN = {
    "masses": ("Mass of every head: as patched, calibrated, trained", "layer", "head", "mass M"),
    "mass-change": ("How far training moved the mass of every head", "change of mass M, %"),
    "contrast": ("How gravitational every head is: its contrast", "contrast (1 = none)"),
    "score-curves": (
        "How the score falls with distance: layer",
        "squared distance d²",
        "score (nats)",
        "median",
    ),
    "score-curves-by-layer": (
        "How the score falls with distance",
        "squared distance d²",
        "(nats)",
        "head",
    ),
    "attention": (
        "Attention of host and gravity: layer",
        "query token",
        "key token",
        "attention weight",
    ),
    "attention-heads": (
        "Attention of host and gravity: heads of layer",
        "host",
        "gravity",
        "head 5",
    ),
    "queries-and-keys": ("Queries and keys of layer", "component 1 (", "attention received"),
    "losses": (
        "Training: loss and gradient norm",
        "nats per token",
        "gradient norm",
        "optimiser step",
    ),
}


@pytest.fixture(scope="module")
def drawings(data) -> dict[str, Drawing]:
    return {drawing.name: drawing for drawing in figures_of(data)}


def _words(svg: str) -> str:
    texts = (
        "".join(e.itertext()) for e in ElementTree.fromstring(svg).iter() if e.tag.endswith("}text")
    )
    return "\n".join(texts)


def test_every_kind_of_figure_is_drawn_where_there_are_data(drawings) -> None:
    assert list(drawings) == list(WRITTEN)


@pytest.mark.parametrize("name", WRITTEN)
def test_a_figure_says_what_it_shows_and_in_which_unit(name: str, drawings) -> None:
    drawing = drawings[name]
    words = _words(drawing.svg(LIGHT))
    assert drawing.title.startswith(WRITTEN[name][0])
    for text in (drawing.title, *WRITTEN[name][1:]):
        assert text in words
    assert drawing.caption.endswith(".")


@pytest.mark.parametrize("name", ["attention", "queries-and-keys"])
def test_themes_differ_in_ink_and_paper(name: str, drawings) -> None:
    light, dark = (drawings[name].svg(theme) for theme in (LIGHT, DARK))
    assert LIGHT.ink in light and DARK.ink not in light
    assert DARK.ink in dark and LIGHT.ink not in dark
    assert DARK.paper in dark


def test_a_figure_is_the_same_every_time_and_changes_no_settings(drawings) -> None:
    before = dict(matplotlib.rcParams)
    for name in ("masses", "queries-and-keys"):
        assert drawings[name].files(DARK) == drawings[name].files(DARK)
    assert dict(matplotlib.rcParams) == before


@inline
def test_inline_figure_is_a_lone_svg_element(draw) -> None:
    svg = draw().inline_svg()
    assert ElementTree.fromstring(svg).tag.endswith("svg")
    assert svg.startswith("<svg")
    links = re.findall(r'href="([^"]*)"', svg)
    assert all(link.startswith(("#", "data:")) for link in links)


@inline
def test_inline_figure_takes_its_ink_from_the_page(draw) -> None:
    svg = draw().inline_svg()
    assert "currentColor" in svg
    assert INK not in svg
    assert svg == draw().inline_svg()


def test_figures_of_one_page_share_no_ids() -> None:
    svgs = [draw().inline_svg() for draw in INLINE.values()]
    first, second = (re.findall(r'\bid="([^"]*)"', svg) for svg in svgs)
    assert set(first).isdisjoint(second)
    for svg in svgs:
        used = re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', svg)
        assert {a or b for a, b in used} <= set(re.findall(r'\bid="([^"]*)"', svg))


def test_heatmap_shows_titles_and_values() -> None:
    words = _words(mass_heatmaps(MASSES).svg(LIGHT)).split("\n")
    assert {"before", "after", "2.50", "50.0", "600"} <= set(words)


def test_change_is_in_percent_of_what_was_there() -> None:
    words = _words(mass_change([[1.0, 4.0]], [[1.5, 3.0]]).svg(LIGHT)).split("\n")
    assert {"+50", "-25"} <= set(words)


def test_heatmap_of_many_heads_names_a_constant_in_its_title() -> None:
    many = {"a": [[0.97] * 32] * 32, "b": [[float(i + 1) for i in range(32)]] * 32}
    assert "a: 0.97 everywhere" in _words(mass_heatmaps(many).svg(LIGHT))


@pytest.mark.parametrize("grid", [[[0.97, 0.97]], [[1.0, 2.0], [3.0]]], ids=["equal", "ragged"])
def test_heatmap_takes_any_masses(grid) -> None:
    assert "<svg" in mass_heatmaps({"one": grid}).svg(LIGHT)


def test_empty_figures_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one mass"):
        mass_heatmaps({"none": []})
    with pytest.raises(ValueError, match="at least one curve"):
        loss_curves([])


def test_layers_are_called_by_their_number_where_it_tells_them_apart() -> None:
    assert layer_labels(["h.3.attn", "h.7.attn"]) == ["3", "7"]
    assert layer_labels(["encoder.0.a", "decoder.0.a"]) == ["0", "1"]


def test_masses_are_read_layer_by_layer() -> None:
    host = tiny_host("qwen2")
    assert masses_by_layer(host) == []
    masses = masses_by_layer(patch_with_gravity(host, GravityConfig()))
    assert [len(row) for row in masses] == [6, 6, 6]
    assert masses[0][0] == pytest.approx(0.9741, abs=1e-4)


class Pieces:
    """As much of a tokenizer as labels need."""

    words = ("cat", " sat", "a\n", "$x$", "\U0001f600", "extraordinarily long")

    def decode(self, ids: list[int]) -> str:
        return self.words[ids[0]]


def test_tokens_are_short_labels_of_letters_that_can_be_drawn() -> None:
    labels = token_labels(range(6), Pieces())
    assert labels[:4] == ["cat", "·sat", "a↵", "$x$"]
    assert labels[4] in ("\U0001f600", "U+1F600")
    assert labels[5] == "extraordinari…"
    assert token_labels([7, 7]) == ["0", "1"]


def test_missing_matplotlib_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(style.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install"):
        loss_curves(PANELS).svg(LIGHT)
