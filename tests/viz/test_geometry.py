"""Words stay inside their figure and off each other, however small the model is."""

from __future__ import annotations

import copy
from itertools import combinations

import pytest
import torch
from hosts import VOCABULARY, tiny_host
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from gravity_hf import GravityConfig, calibrate, patch_with_gravity
from gravity_hf.viz.collecting import collect
from gravity_hf.viz.curves import score_curves
from gravity_hf.viz.drawing import Drawing
from gravity_hf.viz.figures import figures_of
from gravity_hf.viz.heads import HeadStatistics
from gravity_hf.viz.style import LIGHT, drawing_in

# Pixels; an edge of a letter may be rounded to the next one.
_SLACK = 1.0


@pytest.fixture(scope="module", params=[(1, True), (2, False)], ids=["1-head", "2-heads"])
def small(request: pytest.FixtureRequest) -> list[Drawing]:
    """Every figure of one layer and a prompt of four tokens, with a host and without."""
    heads, has_host = request.param
    host = tiny_host(
        "qwen2", num_hidden_layers=1, num_attention_heads=heads, num_key_value_heads=heads
    )
    torch.manual_seed(1)
    batch = {"input_ids": torch.randint(3, VOCABULARY, (1, 4))}
    model = patch_with_gravity(copy.deepcopy(host), GravityConfig())
    report = calibrate(model, [batch], softness=0.5, progress=False)
    with torch.no_grad():
        model.model.layers[0].self_attn.gravity.mass_log.mul_(1.1)
    losses = [{"step": i, "loss": 3.0 / i, "grad_norm": 1.0 / i} for i in range(1, 6)]
    data = collect(
        model,
        batches=[batch],
        host=host if has_host else None,
        results={"training": {"lora": {"losses": losses}, "control": {"losses": losses}}},
        calibration=report.rows,
        progress=False,
    )
    return figures_of(data)


def _words(drawing: Drawing) -> tuple[Bbox, list[tuple[str, Bbox, Text]]]:
    """The figure, and every text that is drawn in it, with the place where it is drawn."""
    seen: list[tuple[str, Bbox, Text]] = []
    draw = Text.draw

    def noting(text: Text, renderer, *args, **options) -> None:
        if text.get_visible() and text.get_text().strip():
            seen.append((text.get_text(), text.get_window_extent(renderer), text))
        draw(text, renderer, *args, **options)

    with pytest.MonkeyPatch.context() as patch, drawing_in(LIGHT):
        patch.setattr(Text, "draw", noting)
        figure = drawing.build(LIGHT)
        figure.draw_without_rendering()
    return figure.bbox, seen


def _check(drawing: Drawing) -> None:
    paper, words = _words(drawing)
    assert drawing.title in [text for text, _, _ in words]
    for text, box, _ in words:
        inside = Bbox.intersection(paper.padded(_SLACK), box)
        assert inside is not None and inside.size == pytest.approx(box.size), (drawing.name, text)
    # Boxes of what is neither level nor upright are mostly empty.
    level = [(text, box) for text, box, word in words if word.get_rotation() % 90 == 0]
    if drawing.name == "queries-and-keys":
        # Names and ticks lie where their points are.
        level = [(text, box) for text, box in level if text == drawing.title or "key;" in text]
    for (one, first), (other, second) in combinations(level, 2):
        shared = Bbox.intersection(first, second)
        is_free = shared is None or min(shared.width, shared.height) <= _SLACK
        assert is_free, f"{drawing.name}: {one!r} over {other!r}"


def test_words_of_a_small_model_stay_inside_and_apart(small: list[Drawing]) -> None:
    assert len(small) == 9
    for drawing in small:
        _check(drawing)


def test_long_numbers_of_many_heads_stay_inside_and_apart() -> None:
    distances = (1234.5, 2234.0, 3234.0, 5234.0, 10000.0)
    heads = [
        HeadStatistics("a", i, "power", 0.00123, 1.23e-5, distances, 2.0, 0.0) for i in range(16)
    ]
    _check(score_curves(heads, "10"))
