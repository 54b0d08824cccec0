"""The table of targets: ratios of the right rows, and verdicts that a miss cannot hide from."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).resolve().parents[2] / "scripts" / "benchmark"


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARK))
    yield
    for name in ("presets", "problems", "targets"):
        sys.modules.pop(name, None)


def one_a_pass(case):
    return 2.0 if case.work == "forward+backward" else 1.0


def rows_of_the_table(time=one_a_pass, memory=10.0):
    """A row for every case of the preset."""
    from presets import table_cases

    return [
        {
            "provider": case.provider,
            "law": case.law,
            "distance": case.distance,
            "pass": case.work,
            "launch": case.launch,
            **dataclasses.asdict(case.shape),
            "p50_ms": time(case),
            "extra_mib": memory,
        }
        for case in table_cases()
    ]


def lines_of(rows):
    from targets import attention_lines

    return attention_lines(rows)


def named(lines, name, subject="force"):
    (found,) = [x for x in lines if (x["name"], x["subject"]) == (name, subject)]
    return found


def test_the_preset_measures_every_target():
    lines = lines_of(rows_of_the_table())
    assert {line["verdict"] for line in lines} <= {"aim reached", "met", "missed"}
    laws = {line["subject"] for line in lines if line["name"] == "forward / SDPA default"}
    assert laws == {"force", "power", "force, lifted", "power, lifted"}


@pytest.mark.parametrize(
    ("ratio", "verdict"), [(1.1, "aim reached"), (1.2, "met"), (1.45, "met"), (1.46, "missed")]
)
def test_a_ratio_is_held_to_both_bounds(ratio, verdict):
    rows = rows_of_the_table(lambda case: ratio if case.provider == "gravity_triton" else 1.0)
    line = named(lines_of(rows), "forward / SDPA default")
    assert line["measured"] == pytest.approx(ratio) and line["verdict"] == verdict


def test_a_row_that_failed_is_not_measured_rather_than_met():
    rows = rows_of_the_table()
    for row in rows:
        if row["provider"] == "gravity_triton" and row["pass"] == "backward":
            row["p50_ms"] = None
    lines = lines_of(rows)
    assert named(lines, "backward / SDPA flash")["verdict"] == "not measured"
    assert named(lines, "backward: power law / force law", "euclidean")["measured"] is None
    assert named(lines, "forward / SDPA flash")["verdict"] == "missed"  # 1.0 > 0.83


def test_no_rows_at_all_is_not_measured():
    assert {line["verdict"] for line in lines_of([])} == {"not measured"}


def test_the_narrow_shape_is_held_to_the_ratio_of_the_main_one():
    def time(case):
        ours = case.provider == "gravity_triton"
        return (2.4 if case.shape.width == 64 else 1.2) if ours else 1.0

    line = named(
        lines_of(rows_of_the_table(time)), "D 64, MHA, S 2048 over main: forward / SDPA default"
    )
    assert line["measured"] == pytest.approx(2.0) and line["verdict"] == "missed"


def test_replays_of_the_backward_are_what_both_take_more_than_the_forward():
    def time(case):
        if case.launch == "eager" or case.provider != "gravity_triton":
            return one_a_pass(case)
        return 4.5 if case.work == "forward+backward" else 1.5

    lines = lines_of(rows_of_the_table(time))
    name = "D 64, MHA, S 2048 over main: {}, graph / SDPA default"
    assert named(lines, name.format("forward"))["measured"] == pytest.approx(1.5)
    assert named(lines, name.format("backward"))["measured"] == pytest.approx(3.0)


def test_decoding_is_held_to_the_fastest_of_sdpa():
    times = {"sdpa": 3.0, "sdpa_flash": 2.0, "sdpa_flash_packed": 0.5, "gravity_triton": 1.0}
    rows = rows_of_the_table(lambda case: times.get(case.provider, 9.0))
    lines = lines_of(rows)
    assert named(lines, "decode, graph / SDPA's best")["measured"] == pytest.approx(0.5)
    packed = named(lines, "decode, graph / SDPA's best, packed by hand too")
    assert packed["measured"] == pytest.approx(2.0) and packed["verdict"] == "missed"
    # FlexAttention is none of SDPA's backends.
    times["flex_attention"] = 0.1
    rows = rows_of_the_table(lambda case: times.get(case.provider, 9.0))
    assert named(lines_of(rows), "decode, eager / SDPA's best")["measured"] == pytest.approx(0.5)


def test_memory_is_in_megabytes_and_must_stay_below_its_bound():
    assert named(lines_of(rows_of_the_table(memory=60.0)), MEMORY)["verdict"] == "met"
    line = named(lines_of(rows_of_the_table(memory=62.0)), MEMORY)
    assert line["measured"] == pytest.approx(65.01, abs=0.01) and line["verdict"] == "missed"


MEMORY = "forward, T 32768, B 1: extra memory, MB"


def test_eager_must_be_slower_by_the_factor():
    def time(case):
        return {"gravity_eager": 50.0, "gravity_triton": 2.0}.get(case.provider, 30.0)

    lines = lines_of(rows_of_the_table(time))
    assert named(lines, "gravity eager / this, forward+backward")["verdict"] == "met"
    assert named(lines, "gravity reference / this, forward+backward")["verdict"] == "missed"


def test_a_training_step_is_held_to_the_host_measured_first():
    from targets import show_lines, training_lines

    rows = [
        {"arm": "sdpa", "p50_ms": 100.0},
        {"arm": "force-lifted", "p50_ms": 104.0},
        {"arm": "power", "note": "failed: no"},
        {"arm": "sdpa-again", "p50_ms": 90.0},
    ]
    lines = training_lines(rows)
    assert [(line["subject"], line["verdict"]) for line in lines] == [
        ("force, lifted", "aim reached"),
        ("power", "not measured"),
    ]
    assert "104.0 ms / 100.0 ms" in show_lines(lines)
