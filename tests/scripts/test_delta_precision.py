"""The table of widths and errors of deltas: complete, and with what the facts make of it."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from knowledge.conftest import make_llama, tokenizer  # noqa: F401 (a fixture)
from knowledge.taught import CONFIG, facts, own_deltas

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "experiments" / "delta_precision.py"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    spec = importlib.util.spec_from_file_location("delta_precision", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "SHAPES", {"small": (128, 96, 2)})
    yield module
    sys.modules.pop("results", None)


def test_every_width_has_its_error_and_every_tier_its_width(script, tmp_path):
    out = tmp_path / "out.json"
    script.main(["--quick", "--commit", "0" * 40, "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["schema"] == script.SCHEMA and "delta_precision.py --quick" in found["command"]
    rows = [r for r in found["per_item"] if (r["codebook"], r["group"]) == ("gaussian", 64)]
    assert [r["bits"] for r in rows] == [2, 3, 4, 5, 6, 7, 8]
    errors = [r["rel_frobenius"]["value"] for r in rows]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02
    for row in found["tiers"]:
        ceiling = script.TIERS[row["tier"]].frobenius
        (bits,) = row["bits"]
        assert row["refused"] == 0 and row["largest"] <= ceiling
        # The width below misses the ceiling for these deltas.
        assert errors[bits - 3] > ceiling
    assert str(tmp_path) not in out.read_text()


def test_facts_are_asked_with_exact_and_with_coded_deltas(script, tokenizer):  # noqa: F811
    llama = make_llama()
    trained = object.__new__(script.Trained)
    trained.model, trained.tokenizer, trained.config = llama, tokenizer, CONFIG
    trained.facts, trained.deltas = facts(), list(own_deltas(llama, tokenizer))
    rows = script.tiers("trained", trained.deltas, trained)
    for row in rows:
        assert row["exact_answers"]["rate"] == 1.0 and row["exact_answers"]["trials"] == 3
        assert row["coded_answers"]["successes"] == 3 - len(row["lost"])
    nothing = [d.scaled(0.0) for d in trained.deltas]
    assert trained.kept(nothing)["coded_answers"]["successes"] == 0
