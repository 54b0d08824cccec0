"""Facts as rows: read, checked, written, and as a dataset."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from gravity_hf.knowledge import fact_files
from gravity_hf.knowledge.errors import ValidationError
from gravity_hf.knowledge.facts import (
    BANKS,
    Fact,
    facts_dataset,
    load_facts,
    validate_facts,
    write_facts,
)

GOLD = Fact(
    id="metals/symbol/gold",
    domain="metals",
    relation="symbol",
    subject="gold",
    prompt="The symbol of gold is",
    answer="Au",
    aliases=("Aurum",),
    paraphrases=("Gold is written as", "Chemists shorten gold to", "In formulas, gold is"),
    unrelated=("The symbol of iron is", "Tin is written as"),
    source="periodic table",
    license="CC0-1.0",
)
LEAD = dataclasses.replace(
    GOLD,
    id="metals/symbol/lead",
    subject="lead",
    prompt="The symbol of lead is",
    answer="Pb",
    aliases=(),
    paraphrases=("Lead is written as", "Chemists shorten lead to", "In formulas, lead is"),
)


def changed(**fields: object) -> Fact:
    return dataclasses.replace(GOLD, **fields)


def test_facts_survive_a_file(tmp_path: Path) -> None:
    accented = changed(id="x/é", answer="Ünal", aliases=("złoty", "二"))
    write_facts([accented, LEAD], tmp_path / "facts.jsonl")
    assert load_facts(tmp_path / "facts.jsonl") == [accented, LEAD]
    assert "złoty" in (tmp_path / "facts.jsonl").read_text(encoding="utf-8")
    assert [x.name for x in tmp_path.iterdir()] == ["facts.jsonl"]


def test_a_list_in_json_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "facts.json"
    path.write_text(json.dumps([GOLD.to_row(), LEAD.to_row()]))
    assert load_facts(path) == [GOLD, LEAD]


def test_optional_fields_may_be_left_out() -> None:
    names = ("id", "domain", "relation", "subject", "prompt", "answer")
    fact = Fact.from_row({name: getattr(GOLD, name) for name in names})
    assert (fact.aliases, fact.paraphrases, fact.unrelated, fact.source) == ((), (), (), "")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id": " "}, "'id'"),
        ({"answer": ""}, "'answer'"),
        ({"answer": " Au"}, "without spaces around"),
        ({"aliases": ("Au",)}, "answers that differ"),
        ({"aliases": ("",)}, "no empty text"),
        ({"prompt": "x" * 3000}, "at most 2000"),
        ({"prompt": "The symbol\0of gold is"}, "NUL"),
        ({"answer": "\ud800"}, "UTF-8"),
        ({"paraphrases": GOLD.paraphrases[:2]}, "at least 3 paraphrases"),
        ({"paraphrases": (*GOLD.paraphrases, "the  symbol of GOLD is")}, "paraphrases that differ"),
        ({"prompt": "The symbol of gold, AU, is"}, "without its answer"),
        ({"paraphrases": (*GOLD.paraphrases, "Aurum or")}, "without its answer 'Aurum'"),
        ({"unrelated": GOLD.unrelated[:1]}, "at least 2 unrelated"),
        (
            {"unrelated": ("Tin is written as", "tin is written as")},
            "unrelated prompts that differ",
        ),
        ({"unrelated": (*GOLD.unrelated, "gold is written as")}, "got one of its own"),
    ],
)
def test_a_row_that_cannot_be_taught_or_measured_is_refused(
    fields: dict[str, object], message: str
) -> None:
    validate_facts([GOLD])
    with pytest.raises(ValidationError, match=message):
        validate_facts([changed(**fields)])


def test_an_answer_inside_a_longer_word_is_no_answer() -> None:
    validate_facts([changed(prompt="The symbol of gold, as in Australia, is")])


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (dataclasses.replace(LEAD, id=GOLD.id), "an id of its own"),
        (dataclasses.replace(LEAD, prompt="Gold is written AS"), "prompts of its own"),
        (dataclasses.replace(LEAD, answer="au", unrelated=GOLD.prompts[:2]), "another answer"),
    ],
)
def test_facts_that_contradict_or_repeat_each_other_are_refused(second: Fact, message: str) -> None:
    validate_facts([GOLD, LEAD])
    with pytest.raises(ValidationError, match=message):
        validate_facts([GOLD, second])


def test_a_prompt_of_another_fact_with_another_answer_may_be_unrelated() -> None:
    validate_facts([GOLD, dataclasses.replace(LEAD, unrelated=GOLD.prompts[:2])])


def test_all_faults_are_named_at_once() -> None:
    with pytest.raises(ValidationError) as error:
        validate_facts([changed(id=f"a/{i}", paraphrases=()) for i in range(30)])
    assert "a/0: expected at least 3" in str(error.value)
    assert "a/1: expected at least 3" in str(error.value)
    assert str(error.value).endswith("...")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([1], "expected an object"),
        ({"id": "x"}, "expected the field 'answer'"),
        ({**GOLD.to_row(), "target": "Au"}, "got also 'target'"),
        ({**GOLD.to_row(), "answer": 79}, "text as 'answer'"),
        ({**GOLD.to_row(), "paraphrases": "one"}, "a list of text as 'paraphrases'"),
        ({**GOLD.to_row(), "aliases": [1]}, "a list of text as 'aliases'"),
    ],
)
def test_a_row_of_another_shape_is_refused_with_its_place(
    tmp_path: Path, row: object, message: str
) -> None:
    path = tmp_path / "facts.jsonl"
    path.write_text(json.dumps(LEAD.to_row()) + "\n\n" + json.dumps(row))
    with pytest.raises(ValidationError, match=rf"line 3: .*{message}"):
        load_facts(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("facts.jsonl", b"", "got an empty file"),
        ("facts.jsonl", b"{", "line 1: expected JSON"),
        ("facts.jsonl", b"[" * 100_000, "line 1: expected JSON"),
        ("facts.jsonl", b'"\xff"', "UTF-8"),
        ("facts.json", b'{"geography": []}', "convert_published_facts"),
        ("facts.txt", b"[]", "ends in .jsonl or .json"),
    ],
)
def test_a_file_that_is_none_is_refused(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValidationError, match=message):
        load_facts(tmp_path / name)


def test_a_file_too_large_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "facts.jsonl"
    write_facts([GOLD], path)
    monkeypatch.setattr(fact_files, "LARGEST_FILE", path.stat().st_size - 1)
    with pytest.raises(ValidationError, match="at most"):
        load_facts(path)


def test_an_unknown_name_lists_the_banks() -> None:
    with pytest.raises(FileNotFoundError, match="chemistry, computing, general, invented"):
        load_facts("chemistri")


def test_a_write_that_fails_leaves_the_older_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "facts.jsonl"
    write_facts([GOLD], path)

    def full(_: int) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(fact_files.os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_facts([LEAD], path)
    assert load_facts(path) == [GOLD]
    assert [x.name for x in tmp_path.iterdir()] == ["facts.jsonl"]


def test_only_facts_that_can_be_read_are_written(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="paraphrases"):
        write_facts([changed(paraphrases=())], tmp_path / "facts.jsonl")
    with pytest.raises(ValidationError, match=".jsonl"):
        write_facts([GOLD], tmp_path / "facts.json")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "accepted"),
    [
        (" Au", True),
        ("Au, of course", True),
        ("\nAurum.", True),
        ("Aus", False),
        ("au", False),
        ("the Au", False),
        ("", False),
    ],
)
def test_a_continuation_is_right_where_it_begins_with_an_answer(text: str, accepted: bool) -> None:
    assert GOLD.accepts(text) is accepted


def test_a_bank_is_a_dataset() -> None:
    pytest.importorskip("datasets")
    facts = load_facts(BANKS[0])
    rows = facts_dataset(BANKS[0])
    assert [Fact.from_row(row) for row in rows] == facts
