"""The feed-forward benchmark: every way beside the dense layer, failures shown, runs continued."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "scripts" / "benchmark"
MODULES = ("gate", "presets", "problems", "providers", "results", "timing", "feed_forward")


@pytest.fixture
def script(monkeypatch):
    path = list(sys.path)
    monkeypatch.syspath_prepend(str(BENCHMARK))
    import feed_forward

    yield feed_forward
    sys.path[:] = path
    for name in MODULES:
        sys.modules.pop(name, None)


def run(script: Any, file: Path, *arguments: str) -> dict[str, Any]:
    script.main(["--quick", "--maps", "low-rank", "--tokens", "1", "--out", str(file), *arguments])
    return json.loads(file.read_text(encoding="utf-8"))


def test_every_way_is_timed_beside_the_dense_layer(script, tmp_path):
    report = run(script, tmp_path / "ff.json")
    ways = [row["way"] for row in report["rows"]]
    skipping = ["block:rows", "block:grouped", "block:auto"]
    assert ways == ["dense", "masked", *skipping, "dense-again"]
    assert all(row["note"] == "" for row in report["rows"])
    dense = report["rows"][0]["ms"]["p50"]
    for row in report["rows"]:
        assert row["speed"] == pytest.approx(dense / row["ms"]["p50"])
    assert [line["way"] for line in report["crossovers"]] == skipping
    assert report["conditions"]["settings"]["dtype"] == "float32"


def test_a_run_that_was_cut_short_goes_on(script, tmp_path, monkeypatch):
    file = tmp_path / "ff.json"
    first = run(script, file, "--commit", "abc")
    file.write_text(json.dumps({**first, "rows": first["rows"][:3]}), encoding="utf-8")
    measured = []
    measure = script.measure
    monkeypatch.setattr(script, "measure", lambda *a: measured.append(a[0]["way"]) or measure(*a))
    again = run(script, file, "--commit", "abc")
    assert measured == ["block:grouped", "block:auto", "dense-again"]
    assert again["rows"][:3] == first["rows"][:3]
    run(script, file, "--commit", "another")
    assert len(measured) == 9


def test_a_layer_that_fails_is_a_row(script, tmp_path, monkeypatch):
    def broken(*_: Any) -> None:
        raise RuntimeError("no memory")

    monkeypatch.setattr(script, "milliseconds", broken)
    report = run(script, tmp_path / "ff.json")
    assert {row["note"] for row in report["rows"]} == {"failed: no memory"}


def test_rules_begin_where_skipping_gains(script):
    base = {"shape": "512/2048", "maps": "full", "block_size": 64, "sparsity": 0.5, "note": ""}
    rows = []
    for tokens, grouped in ((1, 9.0), (2, 5.5), (4, 3.0), (8, 5.1), (16, 3.0)):
        for way, ms in (("masked", 5.0), ("block:grouped", grouped), ("block:rows", 9.0)):
            rows.append({**base, "tokens": tokens, "way": way, "ms": {"p50": ms}})
    # Half of 32 blocks of 64 neurons: three maps of 512 save so many products a block and token.
    assert script.rules(rows) == {"grouped": 4 * 3 * 512 * 64 / 2, "rows": None}
