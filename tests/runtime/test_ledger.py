"""What a ledger keeps, and how it writes it."""

from __future__ import annotations

import copy
import json
import pickle
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import pytest
import torch

from gravity_hf.runtime import Ledger, LedgerEntry, read_ledger, verify
from gravity_hf.runtime.encoding import json_value

PUBLISHED_KEYS = ["entry_id", "timestamp", "agent_id", "event", "payload"]


def test_the_published_methods_do_what_they_did(tmp_path: Path) -> None:
    ledger = Ledger("agent", tmp_path / "made" / "ledger.jsonl")
    first = ledger.log("inference", {"seq_len": 3})
    ledger.log("snapshot")
    assert len(ledger) == 2
    assert ledger.entries("snapshot")[0].payload == {}
    assert ledger.entries(event_filter="inference") == [first]
    snapshot = ledger.snapshot()
    assert (snapshot["agent_id"], snapshot["entry_count"]) == ("agent", 2)
    assert snapshot["entries"][0] == first.to_dict()
    assert list(json.loads(first.to_json())) == PUBLISHED_KEYS
    assert ledger.flush() == 2
    assert len(ledger) == 0
    assert ledger.flush() == 0
    lines = (tmp_path / "made" / "ledger.jsonl").read_text().splitlines()
    assert list(json.loads(lines[0])) == [*PUBLISHED_KEYS, "previous", "hash"]
    assert [entry.event for entry in read_ledger(tmp_path / "made" / "ledger.jsonl")] == [
        "inference",
        "snapshot",
    ]


def test_without_a_file_flush_keeps_everything() -> None:
    ledger = Ledger()
    ledger.log("event")
    assert ledger.flush() == 0
    assert len(ledger) == 1


def test_an_empty_ledger_is_true() -> None:
    assert bool(Ledger())


def test_memory_is_bounded(tmp_path: Path) -> None:
    ledger = Ledger(max_memory_entries=3)
    for i in range(5):
        ledger.log("step", {"i": i})
    assert [entry.payload["i"] for entry in ledger.entries()] == [2, 3, 4]

    written = Ledger(persist_path=tmp_path / "l.jsonl", max_memory_entries=3)
    for i in range(5):
        written.log("step", {"i": i})
    assert len(written) == 2
    assert [e.payload["i"] for e in read_ledger(tmp_path / "l.jsonl")] == [0, 1, 2]


def test_write_through_writes_at_once_and_remembers(tmp_path: Path) -> None:
    ledger = Ledger(persist_path=tmp_path / "l.jsonl", write_through=True, fsync=False)
    ledger.log("a")
    ledger.log("b")
    assert [e.event for e in read_ledger(tmp_path / "l.jsonl")] == ["a", "b"]
    assert len(ledger) == 2
    assert ledger.flush() == 0
    assert len(list(read_ledger(tmp_path / "l.jsonl"))) == 2


def test_leaving_a_with_block_flushes(tmp_path: Path) -> None:
    with Ledger(persist_path=tmp_path / "l.jsonl") as ledger:
        ledger.log("a")
    assert [e.event for e in read_ledger(tmp_path / "l.jsonl")] == ["a"]


def test_what_is_logged_does_not_change_afterwards(tmp_path: Path) -> None:
    ledger = Ledger(persist_path=tmp_path / "l.jsonl")
    payload = {"values": [1.0], "weight": torch.zeros(2)}
    entry = ledger.log("event", payload)
    payload["values"].append(2.0)
    payload["weight"].add_(1.0)
    assert entry.payload == {"values": [1.0], "weight": [0.0, 0.0]}
    entry.payload["values"].append(3.0)
    ledger.flush()
    assert next(read_ledger(tmp_path / "l.jsonl")).payload["values"] == [1.0]


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copy_writes_only_what_it_logs_itself(how, tmp_path: Path) -> None:
    ledger = Ledger(persist_path=tmp_path / "l.jsonl")
    ledger.log("original")
    twin = how(ledger)
    twin.log("twin")
    twin.flush()
    ledger.flush()
    assert sorted(e.event for e in read_ledger(tmp_path / "l.jsonl")) == ["original", "twin"]
    assert verify(tmp_path / "l.jsonl").ok


def test_a_snapshot_is_restored_as_history(tmp_path: Path) -> None:
    past = Ledger("agent")
    for i in range(3):
        past.log("old", {"i": i})
    ledger = Ledger("agent", tmp_path / "l.jsonl", max_memory_entries=4)
    assert ledger.restore(past.snapshot()) == 3
    assert ledger.restore(past.snapshot()) == 0
    ledger.log("new")
    assert list(read_ledger(tmp_path / "l.jsonl"))[-1].event == "new"
    (entry, *_) = past.snapshot()["entries"]
    for wrong in ({"colour": 1}, {**entry, "timestamp": "now"}, {**entry, "payload": [1]}):
        with pytest.raises(ValueError, match="snapshot"):
            ledger.restore({"entries": [wrong]})


@dataclass
class _Settings:
    path: Path
    rate: float


class _Kind(Enum):
    FIRST = "first"


def test_odd_values_become_strict_json() -> None:
    weight = torch.tensor([1.0, float("nan")], requires_grad=True)
    value = {
        "loss": float("nan"),
        "limits": (float("inf"), -float("inf")),
        "weight": weight * 1.0,
        "half": torch.tensor(0.5, dtype=torch.bfloat16),
        "array": np.arange(3),
        "scalar": np.float32(0.5),
        "settings": _Settings(Path("a/b"), 0.1),
        "kind": _Kind.FIRST,
        "dtype": torch.float32,
        "names": {"b", "a"},
        "flag": True,
        3: None,
    }
    encoded = json_value(value)
    assert encoded == {
        "loss": "NaN",
        "limits": ["Infinity", "-Infinity"],
        "weight": [1.0, "NaN"],
        "half": 0.5,
        "array": [0, 1, 2],
        "scalar": 0.5,
        "settings": {"path": "a/b", "rate": 0.1},
        "kind": "first",
        "dtype": "torch.float32",
        "names": ["a", "b"],
        "flag": True,
        "3": None,
    }
    assert encoded["flag"] is True
    assert json.loads(json.dumps(encoded, allow_nan=False)) == encoded


def _itself() -> list:
    value: list = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "where"),
    [
        ({"a": [1, object()]}, r"payload\.a\[1\]"),
        ({"a": b"bytes"}, r"payload\.a"),
        ({"a": 1j}, r"payload\.a"),
        ({"a": torch.zeros(2, dtype=torch.complex64)}, r"payload\.a"),
        ({"a": np.array([object()])}, r"payload\.a\[0\]"),
        ({(1, 2): 0}, "keys"),
        ({1: 0, "1": 0}, "twice"),
        ({"a": _itself()}, "levels"),
    ],
)
def test_what_has_no_json_form_is_refused_before_anything_is_kept(
    value: dict, where: str, tmp_path: Path
) -> None:
    ledger = Ledger(persist_path=tmp_path / "l.jsonl", write_through=True, fsync=False)
    with pytest.raises((TypeError, ValueError), match=where):
        ledger.log("event", value)
    assert len(ledger) == 0
    assert not (tmp_path / "l.jsonl").exists()


def test_no_line_can_be_broken_into_two_by_what_is_logged(tmp_path: Path) -> None:
    text = "a\nb\u2028c\ud800 \N{GREEK SMALL LETTER PI}"
    with Ledger(persist_path=tmp_path / "l.jsonl") as ledger:
        ledger.log("event", {"text": text})
    assert next(read_ledger(tmp_path / "l.jsonl")).payload == {"text": text}
    assert verify(tmp_path / "l.jsonl").ok


def test_an_entry_stands_on_its_own() -> None:
    entry = LedgerEntry(event="x")
    assert entry.agent_id == "" and entry.payload == {}
    assert len(entry.entry_id) == 36 and entry.timestamp > 0


def test_a_payload_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a mapping"):
        Ledger().log("event", [1, 2])


def test_a_folder_is_no_file_to_log_to(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="expected a file"):
        Ledger(persist_path=tmp_path)


@pytest.mark.parametrize("wrong", [{"max_memory_entries": 0}, {"write_through": True}])
def test_settings_that_cannot_be_honoured_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="expected|needs"):
        Ledger(**wrong)
