"""Files of the published schema become facts of ours, with whole words."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from gravity_hf.knowledge.errors import ValidationError
from gravity_hf.knowledge.fact_conversion import convert_published, convert_published_facts
from gravity_hf.knowledge.facts import load_facts, validate_facts, write_facts

# Rows of our own in that schema, with its kinds of damage.
ROWS = {
    "rivers": [
        {"prompt": "Basel lies on the", "target": " Rh", "fact": "Basel lies on the Rhine."},
        {"prompt": "Lyon lies on the", "target": " Rhône", "target_token_id": 5, "note": "x"},
        {"prompt": "Ulm lies on the Dan", "target": "ube", "fact": "Ulm is on the Danube"},
        {"prompt": "Melk lies on the", "target": " Danube", "fact": "Melk: Danube"},
    ],
    "chemistry": [
        {"prompt": "Lye is sodium", "target": " hydrox", "fact": "NaOH is sodium hydroxide"},
        {"prompt": "Twice x is 2", "target": "x", "fact": "2x is twice x"},
    ],
}


@pytest.fixture
def published(tmp_path: Path) -> Path:
    path = tmp_path / "published.json"
    path.write_text(json.dumps(ROWS))
    return path


def test_words_are_put_together(published: Path) -> None:
    found = {x.prompt: x.answer for x in convert_published_facts(published, "old")}
    assert found == {
        "Basel lies on the": "Rhine",
        "Lyon lies on the": "Rhône",
        "Ulm lies on the": "Danube",
        "Melk lies on the": "Danube",
        "Lye is sodium": "hydroxide",
        "Twice x is": "2x",
    }


def test_converted_facts_are_facts(published: Path, tmp_path: Path) -> None:
    facts = convert_published_facts(published, "old")
    validate_facts(facts)
    write_facts(facts, tmp_path / "facts.jsonl")
    assert load_facts(tmp_path / "facts.jsonl") == facts
    assert convert_published_facts(published, "old") == facts
    assert {x.relation for x in facts} == set(ROWS)
    assert all("frames" in x.source for x in facts)


def test_unrelated_prompts_are_near_and_have_other_answers(published: Path) -> None:
    facts = {x.prompt: x for x in convert_published_facts(published, "old")}
    ulm = facts["Ulm lies on the"].unrelated
    assert ulm[:2] == ("Basel lies on the", "Lyon lies on the")
    assert "Melk lies on the" not in ulm


def test_rows_that_cannot_be_taught_are_named(
    published: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = {**ROWS, "bad": [ROWS["rivers"][0], {"prompt": "A rose is a", "target": " rose"}]}
    rows["bad"].append({"prompt": "Nothing is", "target": ""})
    published.write_text(json.dumps(rows))
    facts, skipped = convert_published(published, "old")
    assert len(facts) == 6
    assert [x.where.split(", ", 1)[1] for x in skipped] == [
        "bad, row 1",
        "bad, row 3",
        "bad, row 2",
    ]
    assert "without its answer" in skipped[2].reason
    with caplog.at_level(logging.WARNING, "gravity_hf"):
        convert_published_facts(published, "old")
    assert "bad, row 2 skipped" in caplog.text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "one object of lists"),
        ({"a": 1}, "one object of lists"),
        ({"a": ["x"]}, "a, row 1: expected prompt and target"),
        ({"a": [{"prompt": 1, "target": "x"}]}, "a, row 1: expected prompt and target"),
        ({"a": [{"prompt": "P is", "target": " x"}]}, "at least 2 unrelated"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: object, message: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(json.dumps(content))
    with pytest.raises(ValidationError, match=message):
        convert_published_facts(path, "old")
