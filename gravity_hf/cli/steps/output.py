"""The output folder: refused if it holds something else, replaced only by what is complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .runner import Runner
from .work import RECORD, WorkFolder, read_record

# What makes a folder a model; it comes last, so that an unfinished one is not taken for a model.
_MARKS = ("config.json", "adapter_config.json")
_NEW = ".new"
# In the work folder: everything that lies in OUT goes when the new model is complete.
_REPLACE = "replace"


def require_usable(out: Path, work: Path, model: str, force: bool) -> None:
    """Refuse an output folder that holds anything but an earlier run on the same model.

    The record of the first step, `load`, names the model. With `force` a folder that holds a model
    may be replaced.
    """
    if out.is_file():
        raise ValueError(f"OUT: expected a folder, {str(out)!r} is a file. Choose another name")
    if not out.exists() or not any(out.iterdir()):
        return
    loaded = read_record(work / "load", RECORD)
    ours = loaded is not None or any(work.glob(".*/started.json"))
    if force:
        if ours or any((out / name).is_file() for name in _MARKS):
            return
        raise ValueError(
            f"OUT: --force replaces model folders only, {str(out)!r} has no config.json. "
            "Choose another name, or empty it yourself"
        )
    if not ours:
        raise ValueError(
            f"OUT: expected a new or empty folder, {str(out)!r} is not empty. "
            "Choose another name, or add --force to replace the model in it"
        )
    if loaded is not None and loaded["settings"]["model"] != model:
        raise ValueError(
            f"OUT: {str(out)!r} was made from {loaded['settings']['model']!r}, got {model!r}. "
            "Choose another name, or add --force to replace it"
        )


def start_folder(runner: Runner, force: bool) -> None:
    """Finish what was killed at its very end; with `force` forget all that is finished."""
    # Nobody looks at the folder while the main process changes it.
    runner.processes.wait_for_everyone()
    if runner.is_main:
        _start(runner.out, runner.work, force)
    runner.processes.wait_for_everyone()


def _start(out: Path, work: WorkFolder, force: bool) -> None:
    names = {step.name for step in work.steps}
    if force:
        for path in [*work.root.glob("*"), *work.root.glob(".*")]:
            if path.name.lstrip(".") in names:
                shutil.rmtree(path)
        if out.exists():
            work.root.mkdir(parents=True, exist_ok=True)
            (work.root / _REPLACE).touch()
    for name in names:
        work.recover(name)


@contextmanager
def nothing_left_if_refused(runner: Runner, step: str) -> Iterator[None]:
    """Where `step` was not reached, folders that were new go again when an error ends the run."""
    new = [path for path in (runner.out, runner.work.root) if not path.exists()]
    try:
        yield
    except (ValueError, ImportError):
        if runner.is_main and not runner.work.folder(step).exists():
            for folder in new:
                shutil.rmtree(folder, ignore_errors=True)
        raise


def new_contents(runner: Runner) -> Path:
    """An empty folder to write the finished model into, beside where it will lie."""
    new = runner.out / _NEW
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    return new


def publish(runner: Runner, new: Path, steps: tuple[str, ...]) -> dict[str, Any]:
    """Put what is in `new` into OUT, in place of what `steps` wrote there before.

    Returns:
        A record for `is_saved`.
    """
    out, mark = runner.out, runner.work.root / _REPLACE
    names = sorted(path.name for path in new.iterdir())
    for name in _MARKS:
        (out / name).unlink(missing_ok=True)
    if mark.exists():
        keep = {_NEW, runner.work.root.name}
        old = [path for path in out.iterdir() if path.name not in keep]
    else:
        records = (read_record(runner.work.folder(name), RECORD) for name in steps)
        old = [out / n for record in records if record for n in record["result"]["files"]]
    for path in old:
        _remove(path)
    for path in sorted(new.iterdir(), key=lambda path: path.name in _MARKS):
        target = out / path.name
        if target.is_dir():
            shutil.rmtree(target)
        path.replace(target)
    new.rmdir()
    mark.unlink(missing_ok=True)
    return {"files": names}


def is_saved(runner: Runner, record: dict[str, Any]) -> bool:
    """Whether everything that a step wrote into OUT is still there."""
    return all((runner.out / name).exists() for name in record["files"])


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
