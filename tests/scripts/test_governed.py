"""The experiment on governed training: arms differ in what they say, controls in nothing else."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = ROOT / "scripts" / "experiments"
MODULES = (
    "pool",
    "geolip_runs",
    "governed_arms",
    "governed_arithmetic",
    "governed_report",
    "governed",
)
ARMS = (
    *("plain", "governed", "freezing_only", "rates_only", "random_freezing", "equal_flops"),
    *("rate_matched", "budget_rate_matched"),
)


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A few arms of a tiny Llama: their command and their result."""
    out = tmp_path_factory.mktemp("governed")
    command = ["--quick", "--seeds", "0", "--models", "llama", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        import governed

        governed.main([*command, "--arms", *ARMS, "--commit", "0123abc"])
    content = json.loads((out / "governed.json").read_text())
    rows = {row["arm"]: row for row in content["rows"]}
    return {"rows": rows, "content": content, "out": out}


def test_every_arm_sees_the_same_text_from_the_same_start(quick: dict[str, Any]) -> None:
    rows = quick["rows"]
    assert set(rows) == set(ARMS)
    assert len({row["text"]["digest"] for row in rows.values()}) == 1
    assert {row["seed"] for row in rows.values()} == {0}
    # Nothing has converged in so few steps, and no level is waited for: freezing changes nothing.
    assert rows["freezing_only"]["evaluations"] == rows["plain"]["evaluations"]
    assert rows["governed"]["evaluations"] != rows["plain"]["evaluations"]
    assert quick["content"]["conditions"]["commit"] == "0123abc"


def test_controls_have_what_the_governed_run_had(quick: dict[str, Any]) -> None:
    rows = quick["rows"]
    plain, governed = rows["plain"], rows["governed"]
    assert governed["backward_saved"] > 0.01 and governed["flops"] < plain["flops"]
    assert rows["rate_matched"]["rate"] == pytest.approx(
        plain["rate"] * governed["mean_multiplier"]
    )
    assert rows["budget_rate_matched"]["rate"] == pytest.approx(
        plain["rate"] * rows["rates_only"]["mean_multiplier"]
    )
    share = rows["equal_flops"]["steps"] / plain["steps"]
    assert share == pytest.approx(governed["flops"] / plain["flops"], abs=0.5 / plain["steps"])
    assert rows["random_freezing"]["backward_saved"] == pytest.approx(
        governed["backward_saved"], abs=0.02
    )


def test_arithmetic_is_that_of_the_groups_that_learned(quick: dict[str, Any]) -> None:
    rows = quick["rows"]
    assert rows["plain"]["learned"] == [{"groups": None, "steps": 8}]
    for row in rows.values():
        assert sum(entry["steps"] for entry in row["learned"]) == row["steps"]
    full = rows["plain"]["backward_flops"] / 8
    assert rows["governed"]["backward_flops"] / 8 == pytest.approx(
        full * (1 - rows["governed"]["backward_saved"])
    )


def test_the_summary_of_a_part_has_what_earlier_commands_made(quick: dict[str, Any]) -> None:
    import governed
    from pool import read_results

    known = read_results(quick["out"] / "runs.jsonl")
    options = governed.parse(["--quick", "--seeds", "5", "--arms", "no_budget"])
    found = governed.everything(options, known)
    assert {result["id"] for result in found} == set(known) and len(found) == len(ARMS)
    # Of another preset there is nothing.
    options.preset = "cpu"
    assert governed.everything(options, known) == []


def test_a_command_for_other_arms_keeps_the_rows_there_were(
    quick: dict[str, Any], tmp_path: Path
) -> None:
    import governed

    shutil.copytree(quick["out"], tmp_path, dirs_exist_ok=True)
    command = ["--quick", "--workers", "0", "--seeds", "0", "--models", "llama"]
    governed.main([*command, "--out", str(tmp_path), "--arms", "no_budget"])
    content = json.loads((tmp_path / "governed.json").read_text())
    assert {row["arm"] for row in content["rows"]} == {*ARMS, "no_budget"}
    line = next(one for one in content["summary"] if one["arm"] == "no_budget")
    assert len(line["differences"]) == 1 and line["flops_share"] > 0


def test_evaluations_are_not_in_the_time() -> None:
    from governed_arms import Clock
    from transformers.trainer_callback import TrainerControl

    class Told(Clock):
        time = 0.0

        def _now(self) -> float:
            return self.time

    clock = Told("cpu")
    for begun, ended, evaluates in ((1, 2, False), (3, 5, True), (50, 51, False)):
        clock.time = begun
        clock.on_step_begin(None, None, None)
        clock.time = ended
        clock.on_step_end(None, None, TrainerControl(should_evaluate=evaluates))
    clock.time = 52
    clock.on_train_end(None, None, None)
    assert clock.seconds == (5 - 1) + (52 - 50)


def test_controls_are_made_before_the_next_seed_begins(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import governed

    order: list[tuple[int, str]] = []

    def kept(run: dict[str, Any]) -> dict[str, Any]:
        order.append((run["seed"], run["arm"]))
        known = {"mean_multiplier": 0.5, "backward_saved": 0.1, "flops": 1.0, "seconds": 1.0}
        names = ("model", "arm", "seed", "steps", "rate")
        return {**{name: run[name] for name in names}, "loss": 1.0, **known, "conditions": {}}

    monkeypatch.setattr(governed, "work", kept)
    command = ["--quick", "--models", "llama", "--arms", "rate_matched", "--seeds", "0", "1"]
    governed.main([*command, "--out", str(tmp_path)])
    arms = ("plain", "governed", "rate_matched")
    assert order == [(seed, arm) for seed in (0, 1) for arm in arms]


def test_a_random_schedule_saves_what_is_asked_for_and_leaves_something_to_learn() -> None:
    from governed_arms import random_schedule

    savings = {"a": 0.3, "b": 0.2, "c": 0.05}
    for wanted in (0.05, 0.2, 0.35):
        schedule = random_schedule(savings, wanted, 20, seed=1)
        saved = sum(savings[group] for window in schedule for group in window) / 20
        assert saved == pytest.approx(wanted, abs=0.02)
        assert all(window != set(savings) for window in schedule)


def test_every_governed_arm_has_settings_that_are_taken() -> None:
    from governed_arms import ABLATIONS, GOVERNED, settings_of

    from gravity_hf.training.governed import GovernedTraining

    for arm in (GOVERNED, *ABLATIONS):
        settings = settings_of(arm, 200)
        assert settings is not None
        GovernedTraining.from_dict(json.loads(json.dumps(settings)))
    assert settings_of("plain", 200) is None
