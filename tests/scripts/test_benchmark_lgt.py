"""LGT's benchmark: what it times is what it says, rows that lose or fail stay, tables show both."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from gravity_hf.models.lgt import LGTConfig

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
MODULES = ("lgt", "lgt_calls", "lgt_peer", "lgt_tables", "table_text", "results", "timing")


@pytest.fixture
def scripts(monkeypatch):
    """The modules of the benchmark, by name."""
    for folder in (SCRIPTS, SCRIPTS / "benchmark"):
        monkeypatch.syspath_prepend(str(folder))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        sys.modules.pop(name, None)


def test_the_encoder_has_the_size_and_the_sight_that_it_is_said_to_have(scripts):
    config = LGTConfig.from_preset("edge_150k", vocab_size=1000)
    encoder = scripts["lgt_peer"].SDPAEncoder(config).eval()
    # Counted by hand: 2 V d + T d + L (8 d^2 + 11 d) + 2 d.
    assert sum(p.numel() for p in encoder.parameters()) == 227_840 == 128_000 + 32_768 + 67_072
    ids = torch.randint(1000, (1, 6))
    other = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % 1000], 1)
    both_ways = LGTConfig.from_preset("edge_150k", vocab_size=1000, is_causal=False)
    for settings, moves in ((config, False), (both_ways, True)):
        model = scripts["lgt_peer"].SDPAEncoder(settings).eval()
        with torch.no_grad():
            change = (model(ids) - model(other))[:, :-1].abs().max()
        assert (change > 1e-4) == moves


def test_a_quick_run_writes_rows_presets_and_conditions(scripts, tmp_path, capsys):
    file = tmp_path / "lgt_cpu.json"
    scripts["lgt"].main(["--quick", "--preset", "edge_150k", "--output", str(file)])
    report = json.loads(file.read_text(encoding="utf-8"))
    known = report["conditions"]
    assert known["quick"] is True and known["commit"] and known["versions"]["torch"]
    counts = {row["preset"]: row["parameters"] for row in report["presets"]}
    assert set(counts) == {"edge_150k", "meta_probe", "victorcos", "fractal_res"}
    # The published count but for the masses of channels, which nothing read.
    assert counts["edge_150k"]["v1000"] == 187_629 - 2 * 64
    rows = report["rows"]
    assert {(r["model"], r["dtype"]) for r in rows} == {
        *(("sdpa", dtype) for dtype in ("float32", "float16")),
        *(("lgt", dtype) for dtype in ("float32", "float16", "int8")),
    }
    assert all(0 < r["least_ms"] <= r["median_ms"] and r["peak_mib"] > 0 for r in rows)
    weights = {r["dtype"]: r["weights_bytes"] for r in rows if r["model"] == "lgt"}
    assert weights["int8"] < weights["float32"] and weights["float16"] < 0.6 * weights["float32"]
    assert "lgt/auto" in capsys.readouterr().out
    assert "~150 K, < 1 MB" in scripts["lgt_tables"].presets_text(tmp_path)


def test_a_row_that_cannot_run_stays_with_its_reason(scripts):
    lgt = scripts["lgt"]
    # No CPU multiplies matrices of this dtype.
    rows = lgt.measure(lgt.Case("edge_150k", "forward", 1, 8, True, "float8_e4m3fn"), "cpu", 0.0)
    assert [row["model"] for row in rows] == ["sdpa", "lgt"]
    assert all("median_ms" not in row and "Float8" in row["note"] for row in rows)


KNOWN = {
    "device": "a CPU",
    "versions": {"torch": "2.11", "triton": None, "cudnn": None},
    "commit": "0123456789abcdef",
    "date": "2026-11-26T00:00:00+00:00",
}


def bench_row(model, work, length, time, memory, **changes):
    row = {"preset": "edge_150k", "model": model, "path": "auto", "work": work, "batch": 1}
    row |= {"length": length, "causal": False, "dtype": "float32", "least_ms": time}
    return {**row, "peak_mib": memory, "weights_bytes": 750_004, **changes}


def test_speed_shows_both_models_their_ratio_and_what_was_not_measured(scripts, tmp_path):
    rows = [
        bench_row("sdpa", "forward", 128, 1.0, 0.5),
        bench_row("lgt", "forward", 128, 2.25, 0.75),
        bench_row("lgt", "step", 128, 30.0, 10.0, note="slow"),
        bench_row("lgt", "forward", 128, 3.0, 0.75, causal=True, dtype="int8"),
    ]
    (tmp_path / "lgt_cpu.json").write_text(json.dumps({"conditions": KNOWN, "rows": rows}))
    lines = scripts["lgt_tables"].speed_text(tmp_path).splitlines()
    # A loss is shown like a win.
    assert "| edge_150k | all | 2.25 / 1 ms (2.25) | – | – | – | – |" in lines
    assert "| edge_150k | – | – | 0.75 MB | – | – | 3 ms |" in lines
    assert lines[-1] == "a CPU, torch 2.11, commit 0123456789, 2026-11-26."
    gpu = [
        bench_row("sdpa", "forward", 2048, 0.5, 3.0, path="sdpa"),
        bench_row("lgt", "forward", 2048, 0.75, 4.0, path="triton"),
    ]
    gpu.append({"preset": "edge_150k", "path": "flex", "work": "forward", "length": 2048})
    cuda = {"conditions": {**KNOWN, "device": "a GPU"}, "rows": gpu}
    (tmp_path / "lgt_cuda.json").write_text(json.dumps(cuda))
    lines = scripts["lgt_tables"].speed_text(tmp_path).splitlines()
    assert "| edge_150k | 2048 | 0.5 ms, 3 MiB | 0.75 ms, 4 MiB | – | – |" in lines
