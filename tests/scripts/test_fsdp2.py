"""What scripts/experiments/fsdp2.py concludes from its runs."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[2] / "scripts" / "experiments"


@pytest.fixture
def verdict(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    import fsdp2

    yield fsdp2.verdict
    for name in ("fsdp2", "two_processes"):
        sys.modules.pop(name, None)


def run(losses, local):
    return {
        "losses": losses,
        "mass_dtypes": ["torch.float32"],
        "masses": 12,
        "moved_masses": 12,
        "local_masses": local,
        "saved_whole": True,
    }


RUNS = {
    "single-float32": run([5.0, 4.0], [12]),
    "single-bfloat16": run([5.01, 4.02], [12]),
    "fsdp2-float32": run([5.0, 4.0], [6, 6]),
    "fsdp2-bfloat16": run([5.01, 4.05], [6, 6]),
}


def test_fsdp2_may_differ_from_one_process_by_twice_the_rounding_of_bfloat16(verdict):
    assert all(entry["holds"] for entry in verdict(RUNS).values())
    apart = {**RUNS, "fsdp2-bfloat16": run([5.01, 4.07], [6, 6])}
    failed = [name for name, entry in verdict(apart).items() if not entry["holds"]]
    assert failed == ["losses agree in bfloat16"]


@pytest.mark.parametrize("field, value, failed", [
    ("mass_dtypes", ["torch.bfloat16"], "fsdp2-bfloat16: trained, float32 masses, whole on disk"),
    ("saved_whole", False, "fsdp2-bfloat16: trained, float32 masses, whole on disk"),
    ("moved_masses", 11, "fsdp2-bfloat16: trained, float32 masses, whole on disk"),
    ("local_masses", [12, 12], "masses are sharded over the processes"),
    ("error", "killed", "every run finished"),
])  # fmt: skip
def test_a_run_that_breaks_a_promise_fails_the_verdict(field, value, failed, verdict):
    runs = copy.deepcopy(RUNS)
    runs["fsdp2-bfloat16"][field] = value
    assert [name for name, entry in verdict(runs).items() if not entry["holds"]] == [failed]


def test_the_committed_result_holds():
    report = json.loads((EXPERIMENTS / "results" / "fsdp2.json").read_text(encoding="utf-8"))
    assert report["conditions"]["backend"] == "nccl" and report["conditions"]["devices"] == 2
    assert [name for name, entry in report["holds"].items() if not entry["holds"]] == []
