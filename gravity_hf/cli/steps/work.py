"""The work folder of a command: what is finished, under which settings, and what is not.

Each step has a folder. It is built under another name, gets its record last, and is renamed: a
folder with the step's name is a finished step. The record holds a fingerprint, the hash of the
settings that the step depends on and of the fingerprints of the steps before it; where it differs
from today's, the step runs again.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...training.files import write_json

RECORD = "step.json"
_STARTED = "started.json"


@dataclass(frozen=True)
class Step:
    """One step: `run(runner, folder)` writes its result into `folder` and returns a JSON-able
    record of it.

    `after`: the steps whose results it uses. `together`: every process runs it, not only the main
    one. `keeps`: what an interrupted run left in its folder is used again. `is_intact`: whether
    what it wrote elsewhere, as its record says, is still there.
    """

    name: str
    run: Callable[[Any, Path], dict[str, Any]]
    after: tuple[str, ...] = ()
    together: bool = False
    keeps: bool = False
    is_intact: Callable[[Any, dict[str, Any]], bool] | None = None


class WorkFolder:
    """Finished and unfinished steps under `root`.

    Args:
        root: created with the first step.
        steps: all steps, each after those that it uses.
        settings: for each step the settings that it depends on, JSON-able.
        skipped: names of steps that do not run; steps after one build on what came before it.
        processes: how many run this conversion. An unfinished step of another number of them
            starts anew: its batches were others.
    """

    def __init__(
        self,
        root: Path,
        steps: tuple[Step, ...],
        settings: Mapping[str, dict[str, Any]],
        skipped: frozenset[str],
        processes: int = 1,
    ) -> None:
        self.root, self.steps = root, steps
        # As they will come back from disk: tuples are lists there.
        self.settings: dict[str, dict[str, Any]] = json.loads(json.dumps(settings))
        self.skipped = skipped
        self.processes = processes
        self.fingerprints: dict[str, str] = {}
        for step in steps:
            before = {name: self.fingerprints[name] for name in step.after}
            own = None if step.name in skipped else self.settings[step.name]
            self.fingerprints[step.name] = _hash({step.name: own, "after": before})

    def folder(self, name: str) -> Path:
        """Where the finished step `name` lies."""
        return self.root / name

    def record(self, name: str) -> dict[str, Any] | None:
        """What the finished step `name` returned; None where it did not run under these
        settings."""
        record = read_record(self.folder(name))
        if record is None or record["fingerprint"] != self.fingerprints[name]:
            return None
        return record["result"]

    def why_not_finished(self, name: str) -> str | None:
        """Why a step that has a result runs again, in words; None where it has no result."""
        record = read_record(self.folder(name))
        if record is None:
            return None
        before, now = record["settings"], self.settings[name]
        changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
        if not changed:
            return "a step before it changed"
        changes = (f"{key} was {before.get(key)!r}, is {now.get(key)!r}" for key in changed)
        return "; ".join(_short(change) for change in changes)

    def building(self, name: str) -> Path:
        return self.root / f".{name}"

    def recover(self, name: str) -> None:
        """Finish what was killed between its record and its name."""
        record = read_record(self.building(name))
        if record is not None and record["fingerprint"] == self.fingerprints[name]:
            self._publish(name)

    def open(self, step: Step) -> Path:
        """The folder to build `step` in: empty, or as an interrupted run of it left it."""
        folder = self.building(step.name)
        start = {"fingerprint": self.fingerprints[step.name], "processes": self.processes}
        if folder.exists() and not (step.keeps and read_record(folder, _STARTED) == start):
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / _STARTED, start)
        return folder

    def close(self, step: Step, result: dict[str, Any], seconds: float) -> None:
        """Record the result and give the folder its name: from now on the step is finished."""
        record = {
            "step": step.name,
            "fingerprint": self.fingerprints[step.name],
            "settings": self.settings[step.name],
            "seconds": seconds,
            "result": result,
        }
        write_json(self.building(step.name) / RECORD, record)
        self._publish(step.name)

    def _publish(self, name: str) -> None:
        finished = self.folder(name)
        if finished.exists():
            shutil.rmtree(finished)
        self.building(name).rename(finished)
        # Only needed until now, and far larger than the result.
        for checkpoint in finished.glob("checkpoint-*"):
            shutil.rmtree(checkpoint)


def read_record(folder: Path, name: str = RECORD) -> dict[str, Any] | None:
    """The JSON object in `folder / name`; None where there is none that can be read."""
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _short(text: str, width: int = 120) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."
