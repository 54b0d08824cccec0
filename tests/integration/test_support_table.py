"""The support table: what is written is read again, and the one that ships is sound."""

from __future__ import annotations

import dataclasses
import json

import pytest
from integration.sweep.outcomes import silent_failures

from gravity_hf.integration.support_table import (
    CATEGORIES,
    DOES_NOT_GENERATE,
    NOT_APPLICABLE,
    PASSED,
    PROMISES,
    REFUSED_TO_SAVE,
    SUMMARY_HEADERS,
    SupportRecord,
    SupportTable,
    summary,
    support_table,
    unreached,
)

KEPT = dict.fromkeys(PROMISES, PASSED)


def table_of(*records: SupportRecord) -> SupportTable:
    versions = {"transformers": "5.24.0", "torch": "2.13.0", "python": "3.11.7"}
    return SupportTable(versions, "2026-11-26", "0123456789", {r.model_type: r for r in records})


QWEN2 = SupportRecord(
    "qwen2",
    "causal LM",
    "Qwen2ForCausalLM",
    "passes",
    promises=KEPT,
    reached=("model.layers.*.self_attn",),
    cosine=0.9997,
)
VIT = SupportRecord(
    "vit",
    "vision",
    "ViTModel",
    "partly",
    "correct (wrong: 3 times the error budget)",
    {**KEPT, "correct": "wrong: 3 times the error budget", "cached": "not applicable: no tokens"},
)
BLOOM = SupportRecord("bloom", "causal LM", "BloomModel", "no routed attention", "its own")
RAG = SupportRecord("rag", "other", status="not built", reason="needs faiss")


def test_a_table_survives_its_file():
    table = table_of(QWEN2, VIT, BLOOM, RAG)
    again = SupportTable.from_json(table.to_json())
    assert again == table and again.to_json() == table.to_json()


def test_each_model_type_is_one_line_of_the_file():
    text = table_of(QWEN2, RAG).to_json()
    assert [line.split(":")[0].strip() for line in text.splitlines() if '{"' in line] == [
        '"qwen2"',
        '"rag"',
    ]


def test_the_file_says_every_outcome_without_our_class():
    records = json.loads(table_of(QWEN2, VIT, BLOOM).to_json())["records"]
    assert records["qwen2"]["promises"] == KEPT
    assert records["vit"]["promises"] == VIT.promises
    assert "promises" not in records["bloom"]


def test_kept_and_broken_promises_are_told_apart():
    assert QWEN2.kept == tuple(PROMISES) and QWEN2.broken == {}
    assert VIT.broken == {"correct": "wrong: 3 times the error budget"}
    assert "cached" not in VIT.kept and "backward" in VIT.kept
    assert BLOOM.kept == ()


@pytest.mark.parametrize(
    "change",
    [
        {"status": "fine"},
        {"promises": {"fast": "wrong"}},
        {"promises": {"correct": PASSED}},
        {"promises": {**KEPT, "correct": "fine"}},
        {"speed": 3},
    ],
)
def test_a_record_in_other_words_is_refused(change):
    with pytest.raises(ValueError, match="support record of 'vit'"):
        SupportRecord.from_dict({**VIT.to_dict(), **change})


def test_an_unknown_model_type_is_named_with_what_is_near():
    with pytest.raises(ValueError, match="got 'qwen_2'. Near it: qwen2"):
        table_of(QWEN2, VIT).of("qwen_2")


def test_the_summary_counts_every_category():
    rows = summary(table_of(QWEN2, VIT, BLOOM, RAG))
    assert [row[0] for row in rows] == ["causal LM", "vision", "other", "all"]
    causal, everything = (dict(zip(SUMMARY_HEADERS[1:], rows[i][1:], strict=True)) for i in (0, 3))
    assert (causal["model types"], causal["no promise broken"], causal["refused"]) == (
        "2",
        "1",
        "0",
    )
    assert (causal["every promise kept"], everything["every promise kept"]) == ("1", "1")
    assert causal["own or no attention"] == "1"
    assert (everything["built"], everything["patched"], everything["not tried"]) == ("3", "2", "1")


@pytest.mark.parametrize(
    ("name", "reason", "keeps"),
    [
        ("cached", DOES_NOT_GENERATE, True),
        ("cached", "the host's own fails, too (wrong: 1)", False),
        ("reloaded", f"{REFUSED_TO_SAVE}: ValueError", True),
        ("reloaded", "the host's own fails, too (wrong: 1)", False),
        ("calibrated", DOES_NOT_GENERATE, False),
    ],
)
def test_only_what_a_class_rules_out_is_no_gap(name, reason, keeps):
    outcomes = {**KEPT, name: f"{NOT_APPLICABLE}: {reason}"}
    record = dataclasses.replace(QWEN2, promises=outcomes)
    assert record.keeps_all is keeps
    row = dict(zip(SUMMARY_HEADERS, summary(table_of(record))[-1], strict=True))
    assert (row["no promise broken"], row["every promise kept"]) == ("1", str(int(keeps)))


def test_what_the_inputs_left_out_is_counted():
    part = dataclasses.replace(QWEN2, model_type="x", not_reached=("vision.*.attn",))
    assert "Of the 2 that keep every promise, 1 have" in unreached(table_of(QWEN2, part, BLOOM))


@pytest.fixture(scope="module")
def shipped() -> SupportTable:
    return support_table()


def test_every_model_type_that_does_not_pass_has_a_reason(shipped):
    silent = [r.model_type for r in shipped.records.values() if r.status != "passes"]
    assert [name for name in silent if not shipped.of(name).reason] == []
    assert {record.category for record in shipped.records.values()} <= set(CATEGORIES)


def test_no_model_type_fails_silently(shipped):
    """Where gravity runs its numbers are right; what does not work raises or is refused."""
    failures = {name: silent_failures(record) for name, record in shipped.records.items()}
    assert {name: found for name, found in failures.items() if found} == {}


def test_passing_means_that_gravity_ran(shipped):
    for record in shipped.records.values():
        if record.status == "passes":
            assert record.reached and {"patched", "reached", "correct"} <= set(record.kept)
            assert all(
                o == PASSED or o.startswith(NOT_APPLICABLE) for o in record.promises.values()
            )


def test_five_hundred_model_types_keep_every_promise(shipped):
    assert sum(record.keeps_all for record in shipped.records.values()) >= 500
