"""The attention benchmark: what is wrong is not timed, what fails stays in the table."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCHMARK = Path(__file__).resolve().parents[2] / "scripts" / "benchmark"
MODULES = (
    "attention",
    "cpu_memory",
    "gate",
    "plotting",
    "presets",
    "problems",
    "providers",
    "results",
    "targets",
    "timing",
)
TINY = ["--lengths", "32", "48", "--heads", "4", "--kv-heads", "2", "--width", "16", "--quick"]


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch):
    path = list(sys.path)
    monkeypatch.syspath_prepend(str(BENCHMARK))
    yield
    sys.path[:] = path
    for name in MODULES:
        sys.modules.pop(name, None)


def run(*arguments, output=None):
    """The rows, as text, and the report of a run on the CPU."""
    import attention

    attention.main([*arguments, "--output", str(output)])
    with output.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return rows, json.loads(output.with_suffix(".json").read_text(encoding="utf-8"))


@pytest.mark.slow
def test_a_row_has_its_time_and_everything_it_was_measured_under(tmp_path):
    providers = ["sdpa", "gravity_chunked"]
    rows, report = run(
        *TINY,
        "--providers",
        *providers,
        "--distances",
        "euclidean",
        "lifted",
        "--passes",
        "forward",
        "backward",
        "forward+backward",
        "--no-memory",
        "--plot",
        output=tmp_path / "rows.csv",
    )
    # Two lengths, three passes; dot product once, gravity under two laws and two distances.
    assert len(rows) == 2 * 3 * (1 + 4)
    for row in rows:
        assert 0 < float(row["p20_ms"]) <= float(row["p50_ms"]) <= float(row["p80_ms"]), row
        assert row["torch"] == torch.__version__ and row["commit"] and row["device"]
        assert (row["dtype"], row["heads"], row["kv_heads"]) == ("float32", "4", "2")
    assert report["conditions"]["command"].startswith("python ")
    assert all(set(found.values()) == {"passed"} for found in report["gate"].values())
    picture = (tmp_path / "rows.svg").read_text(encoding="utf-8")
    assert "<svg" in picture
    assert all(name in picture for name in ("forward+backward", "gravity, chunked, power, lifted"))


def test_memory_of_all_scores_is_seen(tmp_path):
    rows, _ = run(
        *("--lengths", "1024", "--heads", "2", "--kv-heads", "2", "--width", "16", "--quick"),
        *("--passes", "forward", "--laws", "force", "--providers", "gravity_reference"),
        output=tmp_path / "rows.csv",
    )
    one_copy = 2 * 1024 * 1024 * 4 / 2**20
    assert one_copy < float(rows[0]["extra_mib"]) < 10 * one_copy


def test_a_wrong_provider_is_reported_and_not_timed(tmp_path, monkeypatch, capsys):
    import gate

    right = gate.attend

    def wrong(provider, problem):
        output = right(provider, problem)
        return output * 1.01 if provider == "gravity_chunked" else output

    monkeypatch.setattr(gate, "attend", wrong)
    rows, report = run(
        *TINY,
        *("--providers", "sdpa", "gravity_chunked", "--laws", "force", "--no-memory"),
        output=tmp_path / "rows.csv",
    )
    for row in rows:
        failed = row["provider"] == "gravity_chunked"
        assert bool(row["p50_ms"]) != failed
        assert row["note"].startswith("gate, forward: output: error") == failed
    found = next(found for key, found in report["gate"].items() if "chunked" in key)
    assert found["forward"].startswith("output: error") and "budget" in found["forward"]
    assert "gate: gravity_chunked" in capsys.readouterr().out


@pytest.mark.parametrize("law", ["force", "power"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gate_sees_a_score_that_is_wrong(law, dtype, monkeypatch):
    """With the constants of Gravity-2 the weights are all but uniform, whatever the scores are."""
    from dataclasses import replace

    import gate
    from problems import Case, Shape

    right = gate.attend
    case = Case("gravity_chunked", law, "euclidean", "backward", Shape(2, 4, 2, 48, 48, 64))
    assert set(gate.check(case, "cpu", dtype).values()) == {"passed"}
    monkeypatch.setattr(
        gate,
        "attend",
        lambda name, problem: right(name, replace(problem, mass=1.05 * problem.mass)),
    )
    assert "budget" in gate.check(case, "cpu", dtype)["forward"]


def test_a_failing_row_stays_and_says_why(tmp_path, monkeypatch):
    import attention

    def broken(case, problem):
        raise RuntimeError("out of something\nand a trace")

    monkeypatch.setattr(attention, "prepare", broken)
    rows, _ = run(*TINY, "--providers", "sdpa", output=tmp_path / "rows.csv")
    assert len(rows) == 4
    assert {row["note"] for row in rows} == {"failed: out of something"}
    assert not any(row["p50_ms"] for row in rows)


@pytest.mark.slow
def test_scores_that_do_not_fit_are_not_tried(tmp_path, monkeypatch):
    import timing

    monkeypatch.setattr(timing, "free_bytes", lambda device: 1)
    rows, _ = run(
        *TINY,
        *("--providers", "gravity_reference", "gravity_chunked", "--laws", "force", "--no-memory"),
        output=tmp_path / "rows.csv",
    )
    for row in rows:
        skipped = row["provider"] == "gravity_reference"
        assert row["note"].startswith("not run: its scores need") == skipped
        assert bool(row["p50_ms"]) != skipped


def test_decoding_is_compared_with_every_way_to_call_sdpa(tmp_path):
    providers = ["sdpa", "sdpa_expanded", "sdpa_packed", "gravity_chunked"]
    rows, report = run(
        *TINY,
        *("--queries", "1", "--laws", "power", "--no-memory", "--providers", *providers),
        output=tmp_path / "rows.csv",
    )
    assert [row["pass"] for row in rows] == ["forward"] * 8
    assert all(row["p50_ms"] for row in rows)
    assert {found["forward"] for found in report["gate"].values()} == {"passed"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--providers", "gravity_triton"], "TRITON_INTERPRET=1"),
        (["--launches", "graph"], "expected --device cuda"),
        (["--preset", "table"], "expected --device cuda"),
        (["--plot"], "expected --output"),
        (["--output", "rows.json"], "ends in .csv"),
        (["--heads", "6", "--kv-heads", "4"], "expected a divisor of 6, got 4"),
        (["--queries", "64", "--lengths", "32"], "expected at most 32, got 64"),
    ],
)
def test_what_cannot_run_is_refused_first(arguments, message, monkeypatch, capsys):
    import attention

    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(SystemExit):
        attention.main(arguments)
    assert message in capsys.readouterr().err


def test_triton_runs_on_a_cpu_through_its_interpreter(tmp_path):
    pytest.importorskip("triton")
    output = tmp_path / "rows.csv"
    # A process of its own: triton reads the variable once, when it is imported.
    command = [sys.executable, str(BENCHMARK / "attention.py"), "--providers", "gravity_triton"]
    command += ["--lengths", "16", "--heads", "2", "--kv-heads", "1", "--width", "16", "--quick"]
    command += ["--passes", "forward", "--no-memory", "--output", str(output), "--threads", "1"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=300)
    with output.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["law"], row["note"]) for row in rows] == [("force", ""), ("power", "")]
    assert all(float(row["p50_ms"]) > 0 for row in rows)
