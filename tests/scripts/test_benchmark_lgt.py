"""LGT's benchmark: what it times is what it says, rows that lose or fail stay, tables show both."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

from gravity_hf.models.lgt import LGT_PRESETS, LGTConfig

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
MODULES = (
    "lgt",
    "lgt_calls",
    "lgt_peer",
    "lgt_tables",
    "mirror",
    "table_text",
    "results",
    "timing",
)


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


def test_a_quick_run_writes_rows_and_conditions_without_places(scripts, tmp_path, capsys):
    file = tmp_path / "lgt_cpu.json"
    scripts["lgt"].main(["--quick", "--preset", "edge_150k", "--output", str(file)])
    report = json.loads(file.read_text(encoding="utf-8"))
    known = report["conditions"]
    assert known["quick"] is True and known["threads"] == 1 and known["commit"]
    assert known["command"].startswith("python scripts/benchmark/lgt.py --quick --preset edge_150k")
    assert str(tmp_path) not in file.read_text(encoding="utf-8") and known["versions"]["torch"]
    rows = report["rows"]
    assert {(r["model"], r["dtype"]) for r in rows} == {
        *(("sdpa", dtype) for dtype in ("float32", "float16")),
        *(("lgt", dtype) for dtype in ("float32", "float16", "int8")),
    }
    assert all(0 < r["least_ms"] <= r["median_ms"] and r["peak_mib"] > 0 for r in rows)
    weights = {r["dtype"]: r["weights_bytes"] for r in rows if r["model"] == "lgt"}
    assert weights["int8"] < weights["float32"] and weights["float16"] < 0.6 * weights["float32"]
    assert "lgt/auto" in capsys.readouterr().out


def test_a_quick_run_of_the_mirror_says_what_watching_costs(scripts, tmp_path, capsys):
    file = tmp_path / "mirror.json"
    scripts["mirror"].main(["--quick", "--output", str(file)])
    report = json.loads(file.read_text(encoding="utf-8"))
    known, (row,) = report["conditions"], report["rows"]
    assert known["quick"] is True and known["threads"] >= 1 and known["settings"]["rounds"] == 1
    assert known["command"] == "python scripts/benchmark/mirror.py --quick --output mirror.json"
    assert (row["model"], row["length"]) == ("edge_150k", 8)
    assert row["forward_ms"]["p50"] > 0 and row["enter_ms"] > 0
    shown = scripts["lgt_tables"].mirror_text(tmp_path).splitlines()
    assert shown[2].startswith("| edge_150k | ") and f"{row['watched_percent']:+.1f} %" in shown[2]
    assert f"watched {row['watched_percent']:+6.1f} %" in capsys.readouterr().out


def test_presets_are_counted_beside_the_published_claims(scripts):
    lines = scripts["lgt_tables"].presets_text().splitlines()
    assert [line.split()[1] for line in lines[2:6]] == list(LGT_PRESETS)
    # The published count but for the masses of channels, which nothing read.
    assert f"| ~150 K, < 1 MB | 58,501 (0.2 MB) | {187_629 - 2 * 64:,} (0.8 MB) |" in lines[2]
    assert "with 512 positions" in lines[-1]


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
    row |= {"length": length, "causal": False, "dtype": "float32", "median_ms": time}
    return {**row, "peak_mib": memory, "weights_bytes": 750_004, **changes}


def write(folder, name, rows, **known):
    content = {"conditions": {**KNOWN, **known}, "rows": rows}
    (folder / name).write_text(json.dumps(content), encoding="utf-8")


def test_speed_shows_both_models_their_ratio_and_what_was_not_measured(scripts, tmp_path):
    rows = [
        bench_row("sdpa", "forward", 128, 1.0, 0.5),
        bench_row("lgt", "forward", 128, 2.25, 0.75),
        bench_row("lgt", "step", 128, 30.0, 10.0, note="slow"),
        bench_row("lgt", "forward", 128, 3.0, 0.75, causal=True, dtype="int8"),
    ]
    write(tmp_path, "lgt_cpu.json", rows, threads=2)
    lines = scripts["lgt_tables"].speed_text(tmp_path).splitlines()
    # A loss is shown like a win.
    assert "| edge_150k | all | 2.25 / 1 ms (2.25) | – | – | – | – |" in lines
    assert lines[-1] == "a CPU, 2 threads, torch 2.11, commit 0123456789, 2026-11-26."
    lines = scripts["lgt_tables"].bits_text(tmp_path).splitlines()
    assert "| edge_150k | – | – | 0.75 MB | – | – | 3 ms |" in lines


def test_on_a_gpu_each_path_is_beside_the_encoder(scripts, tmp_path):
    rows = [
        bench_row("sdpa", "forward", 2048, 0.5, 3.0, path="sdpa"),
        bench_row("lgt", "forward", 2048, 0.75, 4.0, path="triton"),
        bench_row("lgt", "forward", 8192, 2.0, 16.0, path="triton"),
        bench_row("lgt", "forward", 16384, 4.0, 32.0, path="triton"),
        {"preset": "edge_150k", "model": "lgt", "path": "flex", "work": "step", "length": 8192},
    ]
    write(tmp_path, "lgt_cuda.json", rows)
    lines = scripts["lgt_tables"].cuda_text(tmp_path).splitlines()
    assert lines[2] == "| edge_150k | triton | 0.75 / 0.5 ms (1.50) | – | – | – | 2.00 |"
    assert lines[3] == "| edge_150k | flex | – | – | – | – | – |"
    assert lines[-1] == "a CPU, torch 2.11, commit 0123456789, 2026-11-26."


@pytest.mark.parametrize(
    ("table", "command"),
    [
        ("speed_text", "python scripts/benchmark/lgt.py"),
        ("bits_text", "python scripts/benchmark/lgt.py"),
        ("cuda_text", "python scripts/benchmark/lgt.py --device cuda"),
        ("mirror_text", "python scripts/benchmark/mirror.py"),
    ],
)
def test_a_table_without_its_file_names_the_command_that_makes_it(
    scripts, tmp_path, table, command
):
    with pytest.raises(FileNotFoundError, match=f"make it with `{command}"):
        getattr(scripts["lgt_tables"], table)(tmp_path)
