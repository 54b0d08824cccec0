"""The experiments' lists of runs, and the pool that does them."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).resolve().parents[2] / "scripts" / "experiments"


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    yield
    for name in ("pool", "laboratory", "conversion", "mass_granularity", "from_scratch"):
        sys.modules.pop(name, None)


def work(run):
    if run["id"] == "bad":
        raise ValueError("this one fails")
    return {"value": float(run["number"])}


def do(runs, file):
    from pool import run_all

    return run_all(runs, work, file, workers=0, gpus=0, minutes=1)


def test_a_list_that_was_cut_short_goes_on_where_it_stopped(tmp_path, capfd):
    file = tmp_path / "results.jsonl"
    runs = [{"id": f"run {i}", "number": i} for i in range(3)]
    # One run done, and a line that was cut off while it was written.
    file.write_text(json.dumps({"id": "run 1", "value": 41.0}) + "\n" + '{"id": "run 2", "va\n')
    results = do([*runs, {"id": "bad"}], file)
    assert [(r["id"], r["value"]) for r in results] == [
        ("run 0", 0.0),
        ("run 1", 41.0),
        ("run 2", 2.0),
    ]
    assert "bad FAILED" in capfd.readouterr().out


def test_every_run_has_an_id_of_its_own_and_shared_ids_mean_the_same_run():
    import conversion
    import from_scratch
    import mass_granularity

    seeds = [0, 1, 2]
    plans = [from_scratch.plan(s, seeds) for s in ("tune", "bytes", "bytes4x", "shakespeare")]
    for plan in [*plans, conversion.plan(seeds), mass_granularity.plan(seeds)]:
        assert len({run["id"] for run in plan}) == len(plan)
    defaults = {"law": "force", "mass_per": "query_head"}
    one = {run["id"]: {**defaults, **run["how"]} for run in conversion.plan(seeds)}
    other = {run["id"]: {**defaults, **run["how"]} for run in mass_granularity.plan(seeds)}
    shared = set(one) & set(other)
    assert len(shared) >= 15
    for name in shared - {f"host seed={s}" for s in seeds}:
        assert one[name] == other[name]


def test_committed_results_are_runs_of_these_plans():
    """A result that no command here would make has no place among them."""
    import conversion
    import from_scratch
    import mass_granularity

    known = {run["id"] for run in conversion.plan([0, 1, 2]) + mass_granularity.plan([0, 1, 2])}
    assert _ids("conversion.jsonl") <= known
    assert _ids("conversion_small.jsonl") <= known
    for stage in ("tune", "bytes", "shakespeare"):
        known = {run["id"] for run in from_scratch.plan(stage, [0, 1, 2, 3, 4])}
        assert _ids(f"from_scratch_{stage}.jsonl") <= known


def test_committed_results_ran_with_the_settings_that_their_plan_has_now():
    """A default that is changed later must not give an old number another meaning."""
    import from_scratch

    for stage in ("tune", "bytes", "shakespeare"):
        plan = {run["id"]: run for run in from_scratch.plan(stage, [0, 1, 2, 3, 4])}
        for result in _results(f"from_scratch_{stage}.jsonl"):
            run = plan[result["id"]]
            arm, shape = run["arm"], run["shape"]
            wanted = {**from_scratch.ARMS[arm], **run["changes"]}
            usual = shape.get("learning_rate", from_scratch.LEARNING_RATE[arm])
            assert result["training"]["learning_rate"] == wanted.pop("learning_rate", usual)
            assert result["training"]["max_steps"] == shape["steps"]
            assert wanted.items() <= result["arguments"].items(), result["id"]


def _ids(name):
    return {result["id"] for result in _results(name)}


def _results(name):
    lines = (EXPERIMENTS / "results" / name).read_text(encoding="utf-8").splitlines()
    results = [json.loads(line) for line in lines]
    assert all("conditions" in result for result in results)
    return results
