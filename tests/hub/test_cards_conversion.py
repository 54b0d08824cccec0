"""What a conversion leaves for its card: constants, the host's card, pictures."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from cli.conversions import TEXT, convert, ran, save_decoder
from hub.card_results import section
from huggingface_hub import ModelCard

from gravity_hf.cli.convert import pipeline, saving
from gravity_hf.hub.card_tensors import gravity_layers

CARDS = Path(__file__).resolve().parents[2] / "model_cards"
SHORT: dict[str, Any] = {"transfer_steps": 0, "lora_steps": 0, "prompts": [], "samples": 2}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_decoder(tmp_path_factory.mktemp("host") / "decoder")
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: en\n---\n# Mine\n")
    return folder


@pytest.fixture(scope="module")
def drawn(host: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion with pictures."""
    pytest.importorskip("matplotlib")
    out = tmp_path_factory.mktemp("drawn") / "out"
    convert(host, out, figures=True, evaluation_samples=2, base_model="maker/mine", **SHORT)
    return out


def test_results_hold_the_constants_that_were_saved(drawn: Path) -> None:
    results = json.loads((drawn / "results.json").read_text())
    assert results["layers"] == gravity_layers(drawn)
    config = json.loads((drawn / "config.json").read_text())
    assert results["gravity"] == config["gravity"]
    assert results["host"]["parameters"] == results["parameters"]["others"]


def test_the_card_passes_on_what_the_hosts_card_says(drawn: Path) -> None:
    card = ModelCard.load(drawn / "README.md")
    assert card.data.license == "mit" and card.data.language == ["en"]
    assert card.data.base_model == "maker/mine"


def test_no_place_on_this_machine_leaves_it(drawn: Path, host: Path) -> None:
    files = [
        p for p in drawn.rglob("*") if p.is_file() and "work" not in p.relative_to(drawn).parts
    ]
    texts = {file.name: file.read_bytes() for file in files if file.suffix != ".png"}
    assert {"results.json", "README.md", "config.json", "figures.json"} <= texts.keys()
    for place in (host.parent, drawn.parent, TEXT.parent):
        assert [name for name, text in texts.items() if str(place).encode() in text] == []
    results = json.loads(texts["results.json"])
    assert results["host"]["name"] == "decoder" and results["host"]["local"]
    assert results["settings"]["text_files"] == ["words.txt"]


def test_a_licence_that_changes_is_passed_on_without_training_again(
    host: Path, tmp_path: Path
) -> None:
    copy, out = Path(shutil.copytree(host, tmp_path / "host")), tmp_path / "out"
    options = {**SHORT, "skip": ["evaluate", "calibrate"], "distance": "euclidean"}
    convert(copy, out, **options)
    (copy / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# Mine\n")
    _, screen = convert(copy, out, **options)
    assert ran(screen) == ["save", "card"]
    assert ModelCard.load(out / "README.md").data.license == "cc-by-4.0"


def test_the_card_shows_the_pictures_that_were_drawn(drawn: Path) -> None:
    listed = json.loads((drawn / "figures" / "figures.json").read_text())
    shown = section(ModelCard.load(drawn / "README.md"), "Figures")
    assert listed and all(f"](figures/{entry['file']})" in shown for entry in listed)
    assert all((drawn / "figures" / entry["file"]).stat().st_size for entry in listed)


def test_published_pictures_say_what_todays_say(drawn: Path) -> None:
    """Masses and losses are told by training, which this conversion has not."""
    published = captions(CARDS / "figures" / "small-lm-gravity")
    today = captions(drawn / "figures")
    both = (published.keys() & today.keys()) - {"masses", "mass-change", "losses"}
    assert len(both) >= 4
    for name in both:
        # What was trained may have more to say.
        assert today[name] <= published[name], name


def captions(folder: Path) -> dict[str, set[str]]:
    """Title and sentences by name, without the numbers of layers and heads."""
    entries = json.loads((folder / "figures.json").read_text())
    words = {e["name"]: [e["title"], *e["caption"].rstrip(".").split(". ")] for e in entries}
    return {name: {re.sub(r"\d+", "#", text) for text in w} for name, w in words.items()}


def test_pictures_that_are_there_are_not_drawn_again(drawn: Path, host: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in (drawn / "figures").iterdir()}
    options = {**SHORT, "evaluation_samples": 2, "base_model": "maker/mine"}
    _, screen = convert(host, drawn, figures=True, **options)
    assert ran(screen) == [] and "figures: finished before" in screen
    assert {file: file.stat().st_mtime_ns for file in (drawn / "figures").iterdir()} == before


def test_without_matplotlib_the_card_has_no_pictures_and_says_why(
    host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (saving, pipeline):
        monkeypatch.setattr(module, "can_draw", lambda: False)
    _, screen = convert(host, tmp_path / "out", figures=True, evaluation_samples=2, **SHORT)
    assert "matplotlib is not installed" in screen
    assert "## Figures" not in (tmp_path / "out" / "README.md").read_text()
    assert not (tmp_path / "out" / "figures").exists()
