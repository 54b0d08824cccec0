"""README's tables of the knowledge plane say what is in the files, and how much is in them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from gravity_hf.knowledge.facts import load_facts

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = (str(ROOT / "scripts"), str(ROOT / "scripts" / "experiments"))
MODULES = ("knowledge_tables", "belief_report", "belief_measures", "table_text")
HEAD = {
    "device": "a card",
    "versions": {"torch": "2.1", "transformers": "5.1"},
    "commit": "0123456789abc",
    "date": "2026-01-02T03:04",
    "base": {"name": "a base", "dtype": "float32"},
}


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch):
    for folder in FOLDERS:
        monkeypatch.syspath_prepend(folder)
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


def share(hits: int, of: int) -> dict[str, Any]:
    return {"successes": hits, "trials": of, "rate": hits / of, "low": 0.0, "high": 1.0}


def mean(value: float) -> dict[str, Any]:
    return {"seeds": 2, "mean": value, "lowest": value - 0.1, "highest": value + 0.1}


def encoder(found: float) -> dict[str, Any]:
    names = ("top1", "first_right", "activated", "false_activation")
    return {
        **{name: mean(found) for name in names},
        "recall_at_5": mean(0.9),
        "top1_first_seed": share(3, 4),
        "beliefs": 7,
    }


def category(hits: int) -> dict[str, Any]:
    right = {way: share(hits, 4) for way in ("base", "named", "all", "routed")}
    return {"prompts": 4, "right": right, "routing": share(hits, 4)}


def routing(**changes: Any) -> dict[str, Any]:
    runs = [
        {
            "seed": seed,
            "categories": {x: category(seed + 1) for x in ("retrieval", "reasoning", "both")},
        }
        for seed in (0, 1)
    ]
    summary = {
        "routing": {"hidden:quarter": encoder(0.8), "hidden:quarter, by wording": encoder(0.0)},
        "confidence": {"seeds": 1, "auroc": mean(0.8), "ece": mean(0.1), "brier": mean(0.2)},
        "separation": runs,
        "few_shot": {"named 3": {"memorised": mean(1.0), "paraphrases": mean(0.5), "unseen": {}}},
    }
    units = [
        {"part": "routing", "seed": 0},
        {"part": "confidence", "seed": 0, "quality": {"cases": 2}},
        {"part": "few_shot", "seed": 1},
    ]
    return {**HEAD, "units": units, "summary": summary | changes}


def written(folder: Path, name: str, content: dict[str, Any]) -> str:
    from knowledge_tables import tables

    stems = {"knowledge-routing": "belief_routing", "knowledge-interference": "belief_interference"}
    (folder / f"{stems[name]}.json").write_text(json.dumps(content))
    return tables(folder)[name]()


def test_a_table_without_its_file_says_what_makes_it(tmp_path: Path) -> None:
    from knowledge_tables import tables

    for make in tables(tmp_path).values():
        with pytest.raises(FileNotFoundError, match="python scripts/experiments/belief"):
            make()


def test_routing_has_every_part_that_was_measured(tmp_path: Path) -> None:
    text = written(tmp_path, "knowledge-routing", routing())
    assert "| hidden:quarter | 80% | 90% | 80% | 80% |" in text
    assert "7 beliefs, 4 held-out paraphrases each, seed 0." in text
    assert "judged on 2 queries" in text and "AUROC 0.80 (0.70 to 0.90)" in text
    # Of both seeds together 1 + 2 of 4 + 4.
    assert "| a fact is needed (8) | 38% (" in text
    assert "| taught | 3 facts |" in text and "| named | 100% / 50% / – |" in text
    assert "a base, float32, commit 0123456789." in text
    assert "wording alone" not in text


def test_what_is_missing_is_not_made_up(tmp_path: Path) -> None:
    nothing = {"seeds": 0, "auroc": {}, "ece": {}, "brier": {}}
    found = routing(confidence=nothing, few_shot={}, separation=[])
    del found["summary"]["routing"]["hidden:quarter, by wording"]
    text = written(tmp_path, "knowledge-routing", found)
    assert "not fitted" in text and "AUROC" not in text
    assert "never shown" not in text and "reasoning" not in text
    assert "by wording alone" in text


def test_interference_names_the_seeds_of_each_kind(tmp_path: Path) -> None:
    kinds = {"plain": (0, 1), "projected": (0,)}
    content = {
        **HEAD,
        "units": [{"kind": k, "seed": seed} for k, seeds in kinds.items() for seed in seeds],
        "per_item": [{"active": count} for count in (0, 1, 3, 10)],
        "summary": {k: {"points": {"routed 10": {"exact": share(1, 2)}}} for k in kinds},
    }
    text = written(tmp_path, "knowledge-interference", content)
    assert "plain: seeds 0, 1; projected: seed 0" in text
    lines = [line.split(" | ")[0] for line in text.splitlines() if line.startswith("| ")]
    assert lines == ["| active", "| ---", "| 1", "| 10"]
    assert "| 10 | – | 50% (0% to 100%) | – | – | 50% (0% to 100%) | – |" in text


def test_what_sets_a_threshold_is_not_measured_on() -> None:
    from belief_measures import neighbours, sets_threshold

    facts = load_facts("general")
    share_of_facts = sum(map(sets_threshold, facts)) / len(facts)
    assert 0.25 < share_of_facts < 0.42
    setting, measured = (set(neighbours(facts, threshold)) for threshold in (True, False))
    assert setting and measured and not setting & measured
    trained = {fact.unrelated[0] for fact in facts if not sets_threshold(fact)}
    assert not (measured & trained) - {x for fact in facts for x in fact.unrelated[1:]}
    asked = {prompt for fact in facts for prompt in fact.prompts}
    assert not asked & (setting | measured)
