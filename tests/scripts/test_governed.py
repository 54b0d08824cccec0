"""The experiment on governed training: arms differ in what they say, controls in nothing else."""

from __future__ import annotations

import json
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
ARMS = ("plain", "governed", "freezing_only", "random_freezing", "equal_flops", "rate_matched")


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
    command = ["--quick", "--workers", "0", "--seeds", "0", "--models", "llama", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        import governed

        governed.main([*command, "--arms", *ARMS, "--commit", "0123abc"])
    content = json.loads((out / "governed.json").read_text())
    return {"rows": {row["arm"]: row for row in content["rows"]}, "content": content}


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
