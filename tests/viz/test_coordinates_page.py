"""The page of coordinates in a headless browser: its slider, what it says of a token, its edges."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from scripts.space_browser import chromium

from gravity_hf.viz.coordinate_figures import coordinate_slider
from gravity_hf.viz.coordinates import Coordinates, project
from gravity_hf.viz.interactive import interactive_page
from gravity_hf.viz.style import LIGHT

PLOT = "coordinates-plot"
TOKENS = ("<b>fat</b>&amp;", "中é%{x}", " a\n", "b", "c", "<script>alert(1)</script>")
SHOWN = ("<b>fat</b>&amp;", "中é%{x}", "·a↵")
# Where a token is drawn, by the matrices that its scene is drawn with.
PLACE = """([plot, token]) => {
    const graph = document.getElementById(plot), scene = graph._fullLayout.scene._scene;
    const {model, view, projection} = scene.glplot.cameraParams, scale = scene.dataScale;
    const times = (m, v) => [0, 1, 2, 3].map(
        r => m[r] * v[0] + m[4 + r] * v[1] + m[8 + r] * v[2] + m[12 + r] * v[3]);
    const trace = graph.data[1];
    const point = ["x", "y", "z"].map((axis, i) => trace[axis][token] * scale[i]);
    const [x, y, , w] = times(projection, times(view, times(model, [...point, 1])));
    const box = scene.container.getBoundingClientRect();
    return [box.x + box.width * (1 + x / w) / 2, box.y + box.height * (1 - y / w) / 2];
}"""
ARE_AT = """([plot, wanted]) => document.getElementById(plot).data.every(
    trace => trace.x.every((x, i) => Math.abs(x - wanted[i]) < 1e-3))"""
OUTSIDE = """plot => {
    const box = document.getElementById(plot).getBoundingClientRect();
    const texts = [...document.querySelectorAll(`#${plot} svg text`)];
    return [texts.length, texts.filter(text => {
        const own = text.getBoundingClientRect();
        return own.width && (own.left < box.left || own.right > box.right ||
            own.top < box.top || own.bottom > box.bottom);
    }).map(text => text.textContent)];
}"""


@pytest.fixture(scope="module")
def coordinates() -> Coordinates:
    """Six tokens far from each other; the second layer turns them around."""
    points = torch.cat([torch.eye(3), -torch.eye(3)]) * torch.tensor([3.0, 2.0, 1.0])
    layers = torch.stack([points, points.roll(1, 0), 2.0 * points])
    return Coordinates(TOKENS, torch.linspace(0.5, 2.0, len(TOKENS)), layers)


@pytest.fixture(scope="module")
def page(coordinates: Coordinates, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    browser_path = chromium()
    playwright = pytest.importorskip("playwright.sync_api")
    file = tmp_path_factory.mktemp("page") / "page.html"
    shown = coordinate_slider(coordinates, project(coordinates))
    file.write_text(interactive_page("Tokens", [shown], LIGHT), encoding="utf-8")
    with playwright.sync_playwright() as library:
        browser = library.chromium.launch(
            executable_path=browser_path, args=["--no-sandbox", "--enable-unsafe-swiftshader"]
        )
        page = browser.new_page(viewport={"width": 1200, "height": 1200})
        page.wrong = []
        page.on("console", lambda m: page.wrong.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: page.wrong.append(str(error)))
        page.on("dialog", lambda dialog: page.wrong.append("a token was run as a script"))
        page.on("request", lambda r: page.wrong.append(r.url) if r.url[:5] == "http:" else None)
        page.goto(file.as_uri())
        page.wait_for_function(f"document.getElementById('{PLOT}')?._fullLayout?.scene?._scene")
        yield page
        browser.close()


@pytest.fixture(autouse=True)
def _nothing_wrong(page: Any) -> Iterator[None]:
    yield
    assert page.wrong == []


def hovered(page: Any, token: int) -> str:
    """What is shown where the pointer rests on a token."""
    page.mouse.move(5, 5)
    page.wait_for_function(f"!document.querySelector('#{PLOT} g.hovertext')")
    x, y = page.evaluate(PLACE, [PLOT, token])
    page.mouse.move(x - 2, y)
    page.mouse.move(x, y)
    label = page.locator(f"#{PLOT} g.hovertext")
    label.wait_for()
    return label.text_content()


def test_the_slider_goes_to_every_layer(page: Any, coordinates: Coordinates) -> None:
    projection = project(coordinates)
    box = page.locator(f"#{PLOT} .slider-rail-touch-rect").bounding_box()
    ends = box["x"] + 10, box["x"] + box["width"] - 10
    for layer in (0, 1, 2):
        x = ends[0] + (ends[1] - ends[0]) * layer / 2
        page.mouse.click(x, box["y"] + box["height"] / 2)
        wanted = projection.points[layer, :, 0].tolist()
        page.wait_for_function(ARE_AT, arg=[PLOT, wanted])
        title = page.evaluate(
            f"document.getElementById('{PLOT}')._fullLayout.scene.xaxis.title.text"
        )
        assert title == projection.axis_titles(layer)[0]


@pytest.mark.parametrize("token", range(len(SHOWN)), ids=["markup", "letters", "space"])
def test_a_token_says_its_text_as_it_is_written(
    page: Any, coordinates: Coordinates, token: int
) -> None:
    mass = f"{coordinates.masses[token]:.4g}"
    said = hovered(page, token)
    assert said.startswith(f"{SHOWN[token]}position {token}, mass {mass}PC1 ")


@pytest.mark.parametrize("width", [1200, 420], ids=["wide", "narrow"])
def test_no_text_lies_outside_the_figure(page: Any, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 1200})
    page.wait_for_function(
        f"document.getElementById('{PLOT}')._fullLayout.width <= {width} - 40 &&"
        f"document.getElementById('{PLOT}')._fullLayout.width >= Math.min({width}, 1152) - 60"
    )
    count, outside = page.evaluate(OUTSIDE, PLOT)
    assert count > 8 and outside == []
    page.set_viewport_size({"width": 1200, "height": 1200})
