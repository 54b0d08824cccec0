"""The cards of LGT in model_cards/ say what their results say."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from hub.card_results import section, table
from huggingface_hub import ModelCard

FOLDER = Path(__file__).resolve().parents[2] / "model_cards"
_LEAVES = re.compile(r"\d+\.\d+")


def _results(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


FILES = [f for f in sorted(FOLDER.glob("*.results.json")) if _results(f).get("model_type") == "lgt"]


@pytest.fixture(params=FILES, ids=lambda file: file.name)
def results(request: pytest.FixtureRequest) -> dict[str, Any]:
    return _results(request.param) | {"name": request.param.name.removesuffix(".results.json")}


@pytest.fixture
def card(results: dict[str, Any]) -> ModelCard:
    return ModelCard.load(FOLDER / f"{results['name']}.md")


def test_every_measured_cell_is_the_number_of_its_row(
    results: dict[str, Any], card: ModelCard
) -> None:
    _, *body = table(section(card, "What was measured"))
    for cells, row in zip(body, results["evaluation"]["rows"], strict=True):
        bits = row["bits_per_byte"]
        mean = f"{statistics.fmean(bits):.4f}"
        expected = mean if len(bits) < 2 else f"{mean} ± {statistics.stdev(bits):.4f}"
        assert cells[1:3] == [f"{row['parameters']:,}", expected]
        assert row["title"] in cells[0] and ("this model" in cells[0]) == (row["key"] == "this")


def test_winning_and_losing_are_said_as_measured(results: dict[str, Any], card: ModelCard) -> None:
    rows = {r["key"]: r for r in results["evaluation"]["rows"]}
    own = statistics.fmean(rows.pop("this")["bits_per_byte"])
    text = section(card, "What was measured")
    better = re.search(r"better than: ([^.]*?)(?:, and no better than: ([^.]*))?\.", text)
    won = set(better[1].split("; "))
    lost = set((better[2] or "").split("; ")) - {""}
    for row in rows.values():
        assert row["title"] in (won if own < statistics.fmean(row["bits_per_byte"]) else lost)


def test_the_saved_model_is_one_of_the_seeds(results: dict[str, Any], card: ModelCard) -> None:
    (mine,) = (row for row in results["evaluation"]["rows"] if row["key"] == "this")
    assert results["evaluation"]["own"] == pytest.approx(mine["bits_per_byte"][0], abs=1e-9)
    assert f"{results['evaluation']['own']:.4f}" in section(card, "What was measured")
    assert results["parameters"] == mine["parameters"]


def test_the_constants_are_those_of_the_layers(results: dict[str, Any], card: ModelCard) -> None:
    _, *body = table(section(card, "The law"))
    for cells, row in zip(body, results["layers"], strict=True):
        values = [row["G"][which] for which in ("lowest", "median", "highest")]
        assert cells[0] == f"`{row['layer']}`"
        assert cells[2] == " / ".join(f"{value:.4g}" for value in values)
