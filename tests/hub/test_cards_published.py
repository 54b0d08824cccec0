"""The cards in model_cards/ say what their results say, and can be read back."""

from __future__ import annotations

import importlib.util
import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hub.card_results import section, table, upload
from hub.loopback import LoopbackHub
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import model_index_to_eval_results

from gravity_hf.hub.card_kinds import card_kind
from gravity_hf.hub.card_metadata import eval_results

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "model_cards"
NAMES = sorted(file.name.removesuffix(".results.json") for file in FOLDER.glob("*.results.json"))
CONVERSIONS = [
    name
    for name in NAMES
    if "host" in json.loads((FOLDER / f"{name}.results.json").read_text(encoding="utf-8"))
]
_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)+(?:e[-+]?\d+)?")
_FORMATS = (".4f", "+.4f", ".2f", ".3g", ".4g", "g")


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=CONVERSIONS)
def conversion(request: pytest.FixtureRequest) -> str:
    return request.param


def card_of(name: str) -> ModelCard:
    return ModelCard.load(FOLDER / f"{name}.md")


def results_of(name: str) -> dict[str, Any]:
    return json.loads((FOLDER / f"{name}.results.json").read_text())


def leaves(content: Any) -> Iterator[Any]:
    if isinstance(content, dict | list):
        for part in content.values() if isinstance(content, dict) else content:
            yield from leaves(part)
    else:
        yield content


# Titles of the columns of the table of measurements: key in a row, format.
_MEASURED = {
    "loss, nats per token": ("loss", ".4f"),
    "mean cosine to the host's": ("cosine_mean", ".4f"),
    "lowest": ("cosine_min", ".4f"),
    "Spearman": ("spearman", ".4f"),
    "same neighbour": ("same_neighbour", ".2f"),
}
_ATTENTION = {"softness": "softness_median", "contrast": "contrast_median", "KL": "kl_mean"}
_LAW = {"mass M": "mass", "softening eps": "softening", "key radius R": "key_radius"}


def numbers_of(results: dict[str, Any]) -> set[str]:
    """Every number of the results as a card may write it, and differences of their losses."""
    found: set[str] = set()
    for leaf in leaves(results):
        if isinstance(leaf, str):
            found.update(_NUMBER.findall(leaf))
        elif isinstance(leaf, int | float):
            found.update(format(leaf, form) for form in _FORMATS)
    losses = [row["loss"] for row in results["evaluation"]["rows"] if "loss" in row]
    found.update(format(a - b, "+.4f") for a, b in itertools.product(losses, losses))
    return found


def test_there_is_a_card_of_an_encoder_and_of_a_language_model() -> None:
    measures = {results_of(name)["evaluation"]["measure"] for name in CONVERSIONS}
    assert measures == {"loss", "embeddings"}


def test_every_decimal_number_comes_from_the_results(conversion: str) -> None:
    numbers = set(_NUMBER.findall(card_of(conversion).text))
    assert len(numbers) > 20
    assert numbers - numbers_of(results_of(conversion)) == set()


def test_every_measured_cell_is_the_number_of_its_row_and_column(conversion: str) -> None:
    rows = results_of(conversion)["evaluation"]["rows"]
    losses = {row["key"]: row.get("loss") for row in rows}
    header, *body = table(section(card_of(conversion), "What was measured"))
    assert [cells[0] for cells in body] == [row["title"] for row in rows]
    for cells, row in zip(body, rows, strict=True):
        for title, cell in list(zip(header, cells, strict=True))[1:]:
            assert cell == _expected(title, row, losses), (row["key"], title)


def _expected(title: str, row: dict[str, Any], losses: dict[str, float]) -> str:
    key = row["key"]
    if title == "against the host":
        return "–" if key == "host" else format(row["loss"] - losses["host"], "+.4f")
    if title == "against the control":
        return format(row["loss"] - losses["control"], "+.4f") if key == "healed" else "–"
    if title in _ATTENTION:
        own = row.get("attention")
        return format(own[_ATTENTION[title]], ".3g") if own else "–"
    measured, form = _MEASURED[title]
    return format(row[measured], form)


def test_every_constant_is_that_of_its_layer(conversion: str) -> None:
    header, *body = table(section(card_of(conversion), "The law"))
    layers = results_of(conversion)["layers"]
    assert [cells[:2] for cells in body] == [
        [f"`{row['layer']}`", str(row["mass"]["count"])] for row in layers
    ]
    for cells, row in zip(body, layers, strict=True):
        for title, cell in list(zip(header, cells, strict=True))[2:]:
            values = [row[_LAW[title]][which] for which in ("lowest", "median", "highest")]
            assert cell == " / ".join(f"{value:.4g}" for value in values), (row["layer"], title)


def test_a_card_reads_back_with_its_results(name: str) -> None:
    card = card_of(name)
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    index = card.data.to_dict()["model-index"]
    results, own = results_of(name), card_kind(results_of(name))
    if own is None:
        made = eval_results(results)
    else:
        made = own.metadata(own.complete(results), name).eval_results
    assert model_index_to_eval_results(index) == (name, made)


def test_the_hub_takes_the_metadata(name: str, hub: LoopbackHub) -> None:
    upload(card_of(name), hub)
    assert hub.count("validate-yaml") == 1


def test_a_card_is_what_the_script_makes_of_the_results(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("make_cards", ROOT / "scripts/make_cards.py")
    script = importlib.util.module_from_spec(spec)
    # Where dataclasses look for the module of a class.
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    file = f"{name}.results.json"
    (tmp_path / file).write_bytes((FOLDER / file).read_bytes())
    (tmp_path / "figures").symlink_to(FOLDER / "figures")
    monkeypatch.setattr(script, "CARDS", tmp_path)
    script.main(["render", "--work", str(tmp_path / "work")])
    assert (tmp_path / f"{name}.md").read_text() == (FOLDER / f"{name}.md").read_text()


def test_a_card_names_its_command_and_no_place_on_a_machine(name: str) -> None:
    results = results_of(name)
    assert f"~~~~bash\n{results['conditions']['command']}\n~~~~" in card_of(name).text
    for leaf in leaves(results):
        assert not (isinstance(leaf, str) and re.search(r"(^|[\s'\"])(/|~/|\.\./)\w", leaf)), leaf


def test_pictures_that_a_card_shows_are_there(name: str) -> None:
    for path in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", card_of(name).text):
        assert (FOLDER / path).is_file(), path


def test_the_index_names_every_card_and_its_command(name: str) -> None:
    index = (FOLDER / "README.md").read_text()
    assert f"[{name}]({name}.md)" in index and f"[results]({name}.results.json)" in index
