"""The work folder: what counts as finished, whatever the moment at which a run was killed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gravity_hf.cli.steps.work import Step, WorkFolder


def _run(runner: Any, folder: Path) -> dict[str, Any]:
    return {}


STEPS = (
    Step("a", _run),
    Step("b", _run, after=("a",), keeps=True),
    Step("side", _run, after=("a",)),
    Step("c", _run, after=("b",)),
)
SETTINGS: dict[str, dict[str, Any]] = {"a": {"x": 1}, "b": {"y": (1, 2)}, "side": {}, "c": {}}


def work(root: Path, skipped: frozenset[str] = frozenset(), processes: int = 1, **changes: Any):
    return WorkFolder(root, STEPS, {**SETTINGS, **changes}, skipped, processes)


def test_a_step_is_finished_under_its_settings_and_no_others(tmp_path: Path) -> None:
    first = work(tmp_path)
    first.open(STEPS[0])
    assert first.record("a") is None
    first.close(STEPS[0], {"found": 3}, seconds=1.0)
    assert work(tmp_path).record("a") == {"found": 3}
    other = work(tmp_path, a={"x": 2})
    assert other.record("a") is None
    assert other.why_not_finished("a") == "x was 1, is 2"


def test_a_fingerprint_covers_the_steps_before_and_not_those_beside(tmp_path: Path) -> None:
    now, changed = work(tmp_path), work(tmp_path, b={"y": (1, 3)})
    differing = {n for n in now.fingerprints if now.fingerprints[n] != changed.fingerprints[n]}
    assert differing == {"b", "c"}


def test_a_skipped_step_hands_on_what_came_before_it(tmp_path: Path) -> None:
    skipped = frozenset({"b"})
    plain, changed = work(tmp_path, skipped), work(tmp_path, skipped, b={"y": 9})
    assert plain.fingerprints == changed.fingerprints
    assert plain.fingerprints["c"] != work(tmp_path).fingerprints["c"]
    assert plain.fingerprints["c"] != work(tmp_path, skipped, a={"x": 2}).fingerprints["c"]


def test_settings_are_compared_as_they_come_back_from_disk(tmp_path: Path) -> None:
    first = work(tmp_path)
    first.open(STEPS[1])
    first.close(STEPS[1], {}, seconds=0.0)
    later = work(tmp_path, a={"x": 2})
    assert later.why_not_finished("b") == "a step before it changed"


def test_an_interrupted_step_goes_on_only_where_it_may(tmp_path: Path) -> None:
    for step, kept in ((STEPS[0], False), (STEPS[1], True)):
        (work(tmp_path).open(step) / "part").touch()
        assert (work(tmp_path).open(step) / "part").exists() == kept


def test_an_interrupted_step_of_other_settings_or_processes_starts_anew(tmp_path: Path) -> None:
    for later in (work(tmp_path, b={"y": 0}), work(tmp_path, processes=2)):
        (work(tmp_path).open(STEPS[1]) / "part").touch()
        assert not (later.open(STEPS[1]) / "part").exists()


def test_a_step_killed_between_its_record_and_its_name_is_finished(tmp_path: Path) -> None:
    first = work(tmp_path)
    first.open(STEPS[1])
    first.close(STEPS[1], {"found": 1}, seconds=0.0)
    first.folder("b").rename(first.building("b"))
    (first.building("b") / "checkpoint-2").mkdir()
    work(tmp_path, a={"x": 2}).recover("b")
    assert first.record("b") is None
    work(tmp_path).recover("b")
    assert first.record("b") == {"found": 1}
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_a_record_that_was_cut_off_is_none(tmp_path: Path) -> None:
    first = work(tmp_path)
    first.open(STEPS[0])
    first.close(STEPS[0], {}, seconds=0.0)
    record = first.folder("a") / "step.json"
    record.write_text(record.read_text()[:20])
    assert first.record("a") is None and first.why_not_finished("a") is None
