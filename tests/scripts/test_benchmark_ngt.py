"""NGT's benchmark: models of equal size in turns; rows that fail stay; tables show them all."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
MODULES = (
    *("pool", "timing", "results", "gate", "table_text", "lgt_peer", "lgt_calls", "ngt_arms"),
    *("ngt_report", "ngt_recall", "ngt_subjects", "ngt", "ngt_tables"),
)


@pytest.fixture(scope="module")
def scripts():
    """The modules of the benchmark, by name."""
    with pytest.MonkeyPatch.context() as patch:
        for folder in (SCRIPTS, SCRIPTS / "experiments", SCRIPTS / "benchmark"):
            patch.syspath_prepend(str(folder))
        for name in MODULES:
            patch.delitem(sys.modules, name, raising=False)
        yield {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        sys.modules.pop(name, None)


def test_a_quick_run_times_all_models_of_a_case_in_turns(scripts, tmp_path, capsys):
    file = tmp_path / "ngt_cpu.json"
    given = ["--quick", "--models", "NGT v2", "vanilla", "--output", str(file)]
    scripts["ngt"].main(given)
    content = file.read_text(encoding="utf-8")
    report = json.loads(content)
    known, rows = report["conditions"], report["rows"]
    assert known["threads"] == 1 and known["quick"] is True and known["commit"]
    assert known["command"].startswith("python scripts/benchmark/ngt.py --quick")
    assert str(tmp_path) not in content
    assert [(row["work"], row["model"]) for row in rows] == [
        (work, model) for work in ("step", "forward", "generate") for model in ("NGT v2", "vanilla")
    ]
    for row in rows:
        assert 0 < row["p20_ms"] <= row["median_ms"] <= row["p80_ms"] and row["rounds"] == 2
        assert row["tokens_per_s"] > 0 and ("peak_mib" in row) == (row["work"] != "generate")
        assert (row["ratio"] == 1.0) == (row["model"] == "vanilla")
    sizes = {row["parameters"] for row in rows}
    assert max(sizes) <= 1.01 * min(sizes)
    # AdamW's moments and gradients are there beside weights.
    step = next(row for row in rows if row["work"] == "step")
    assert step["peak_mib"] * 2**20 > 4 * 4 * step["parameters"]
    assert "NGT v2" in capsys.readouterr().out


def test_a_time_is_that_of_one_call_and_ratios_are_within_a_round(scripts, monkeypatch):
    subjects = scripts["ngt_subjects"]
    clock = iter([0, 8, 8, 12, 12, 28, 28, 30])  # a, b, a, b: 8 and 4 seconds, 16 and 2
    monkeypatch.setattr(subjects.time, "perf_counter", lambda: float(next(clock)))
    both = {name: subjects.Subject(lambda: (), {}) for name in ("a", "b")}
    found = subjects.rounds(both, "cpu", 2, calls=2, tokens=2, peer="b")
    assert found["a"]["median_ms"] == pytest.approx(3000.0)
    assert found["a"]["ratio"] == pytest.approx((2 + 8) / 2)
    assert found["b"]["median_ms"] == pytest.approx(750.0) and found["b"]["ratio"] == 1.0


def test_a_model_that_cannot_run_stays_with_its_reason(scripts, monkeypatch):
    ngt = scripts["ngt"]

    def build(name, *args, **kwargs):
        if name == "NGT v2":
            raise RuntimeError("out of memory")
        return scripts["ngt_subjects"].Subject(lambda: (), {"parameters": 1})

    monkeypatch.setattr(ngt, "build", build)
    case = ngt.Case("quick", "step", "eager", 2, 16)
    failed, row = ngt.measure(case, ["NGT v2", "vanilla"], "cpu", 2)
    assert failed["note"] == "out of memory" and "median_ms" not in failed
    assert row["ratio"] == 1.0


def test_rows_of_other_cases_stay_if_device_and_commit_are_the_same(scripts, tmp_path):
    ngt = scripts["ngt"]
    cases = [ngt.Case("large", "step", mode, 16, 512) for mode in ngt.MODES]
    rows = [{"model": "vanilla", **vars(case)} for case in cases]
    file = tmp_path / "ngt_cuda.json"
    known = {"device": "a GPU", "commit": "012", "date": "yesterday"}
    assert ngt.kept_rows(file, known, {cases[0]}) == []
    file.write_text(json.dumps({"conditions": known, "rows": rows}))
    assert ngt.kept_rows(file, {**known, "date": "today"}, {cases[0]}) == rows[1:]
    assert ngt.kept_rows(file, {**known, "commit": "345"}, {cases[0]}) == []


def row_of(model, work, time, **changes):
    row = {"shape": "large", "work": work, "mode": "eager", "batch": 16, "length": 512}
    row |= {"model": model, "parameters": 25_400_000, "median_ms": time, "peak_mib": 100.0}
    return {**row, **changes}


def test_the_table_shows_times_ratios_and_memory_of_every_case(scripts, tmp_path):
    rows = [
        row_of("NGT v2", "step", 12.0, ratio=1.2, peak_mib=150.0),
        row_of("vanilla", "step", 10.0, ratio=1.0),
        row_of("NGT v2", "generate", 3.0, ratio=1.5),
        {key: x for key, x in row_of("vanilla", "generate", 2.0).items() if key != "median_ms"},
    ]
    for row in rows[2:]:
        del row["peak_mib"]
    versions = {"torch": "2.11", "triton": "3.6", "cudnn": 9}
    known = {"device": "a GPU", "versions": versions, "commit": "0123456789abcdef"}
    content = {"conditions": {**known, "date": "2026-11-26T00:00"}, "rows": rows}
    (tmp_path / "ngt_cuda.json").write_text(json.dumps(content))
    lines = scripts["ngt_tables"].speed_text(tmp_path, "cuda").splitlines()
    assert lines[0] == "| ms (x vanilla), memory | NGT v2 | vanilla |"
    step = "12 (1.20), 150 MiB (1.50) | 10, 100 MiB"
    assert lines[2] == f"| 25 M: training step, 16 x 512, eager | {step} |"
    assert lines[3] == "| 25 M: a token generated, of 512 | 3 (1.50) | – |"
    assert lines[-1].startswith("a GPU, torch 2.11, Triton 3.6, cuDNN 9, commit 0123456789")
    with pytest.raises(FileNotFoundError, match=r"`python scripts/benchmark/ngt.py`"):
        scripts["ngt_tables"].speed_text(tmp_path, "cpu")


def test_no_model_runs_uncompiled_unseen(scripts):
    """All models are of one class: with few recompilations allowed the last would run eagerly."""
    import torch
    from torch._dynamo import config

    before = (config.recompile_limit, config.fail_on_recompile_limit_hit)
    try:
        case = scripts["ngt"].Case("quick", "forward", "compile", 1, 4)
        scripts["ngt"].measure(case, [], "cpu", 1)
        assert config.fail_on_recompile_limit_hit
        assert config.recompile_limit >= 2 * len(scripts["ngt_arms"].ARMS)
    finally:
        config.recompile_limit, config.fail_on_recompile_limit_hit = before
        torch._dynamo.reset()


def test_graphs_are_cuda_graphs_of_marked_steps_or_an_error(scripts, monkeypatch):
    import torch

    seen = []
    compiled = lambda model, **options: seen.append(options) or model  # noqa: E731
    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: seen.append("begin"))
    given = {"mode": "graphs", "size": (1, 4), "made": 1}
    build = scripts["ngt_subjects"].build
    subject = build("vanilla", "quick", 64, "step", "cpu", **given)
    subject.call()
    options = {"dynamic": False, "mode": "reduce-overhead"}
    assert seen == [options, "begin", "begin", "begin", "begin"]
    assert "peak_mib" not in subject.known

    def skip():
        torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] += 1

    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", skip)
    with pytest.raises(RuntimeError, match="expected CUDA graphs alone, got 3 parts"):
        build("vanilla", "quick", 64, "step", "cpu", **given)


def test_what_compiles_longest_is_measured_last(scripts):
    cases = list(scripts["ngt"].cuda_cases((16, 32)))
    steps = [(case.mode, case.batch) for case in cases if case.work == "step"]
    assert steps == [(mode, n) for mode in ("eager", "graphs", "compile") for n in (16, 32)]
    assert [case.work for case in cases[:6]] == ["step"] * 6


@pytest.mark.parametrize("batch", [16, 64])
def test_the_committed_step_keeps_its_promises(batch):
    """On the GPU no training step takes more than 1.25 times the vanilla twin's time, where the
    host's launches do not count, or 1.2 times its memory."""
    file = SCRIPTS / "benchmark" / "results" / "ngt_cuda.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    steps = [row for row in rows if row["work"] == "step" and row["batch"] == batch]
    ours = {row["mode"]: row for row in steps if row["model"] == "NGT v2"}
    vanilla = {row["mode"]: row for row in steps if row["model"] == "vanilla"}
    assert ours["graphs"]["ratio"] <= 1.25
    assert ours["eager"]["peak_mib"] <= 1.2 * vanilla["eager"]["peak_mib"]
