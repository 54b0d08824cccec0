"""The folder of a training: a room for what is unfinished, and the model once it is done."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import PartialState

from ..files import write_json
from ..folders import COMPANIONS, WEIGHTS, require_free
from ..recipe import checkpoints_of
from .history import ALPHAS_FILE, DEVIATIONS_FILE
from .settings import GeolipSettings

__all__ = ["RESULTS_FILE", "SAMPLES_FILE", "WORK_FOLDER", "claimed", "publish", "require_same_data"]

RESULTS_FILE = "results.json"
SAMPLES_FILE = "samples.safetensors"
WORK_FOLDER = "work"
# By this file a room is known to be one.
_SETTINGS_FILE = "geolip_training.json"
_DATA_FILE = "geolip_data.json"
# Of TensorBoard, where Trainer puts them.
_CURVES = "runs"
_CARD, _FIGURES = "README.md", "figures"
_RECORDS = (RESULTS_FILE, SAMPLES_FILE, ALPHAS_FILE, DEVIATIONS_FILE, _CARD)


@contextmanager
def claimed(settings: GeolipSettings, state: PartialState) -> Iterator[Path]:
    """The room for checkpoints, `OUT/work`, or one that is gone afterwards where nothing is kept.

    A run that ends in an error before it has anything to go on with leaves no room behind.

    Args:
        settings: `out`, `resume`, `force`, and all that a resumed run must have in common.
        state: of the processes of a run the main one clears and writes.

    Raises:
        ValueError: `out` holds another model, or a run that this one does not go on with.
    """
    if settings.out is None:
        with tempfile.TemporaryDirectory() as room:
            yield Path(room)
        return
    out = Path(settings.out)
    work = out / WORK_FOLDER
    is_new = not out.exists()
    _check(out, work, settings)
    # What one process writes, the others must not find when they look.
    state.wait_for_everyone()
    if state.is_main_process:
        if not settings.resume:
            shutil.rmtree(work, ignore_errors=True)
        write_json(work / _SETTINGS_FILE, settings.that_matter())
    state.wait_for_everyone()
    try:
        yield work
    except BaseException:
        if state.is_main_process:
            _clear_if_bare(work, out if is_new else None)
        raise


def require_same_data(work: Path, data: dict[str, Any], state: PartialState) -> None:
    """Refuse to go on with a run on other data than those it began with: what is held out now may
    have been trained on.

    Args:
        work: of `claimed`.
        data: what makes the data what they are, JSON-able.
        state: the main process writes them down.

    Raises:
        ValueError: checkpoints of a run on other data.
    """
    file = work / _DATA_FILE
    if file.is_file() and checkpoints_of(work):
        known = json.loads(file.read_text(encoding="utf-8"))
        differing = sorted(name for name in data if data[name] != known.get(name))
        if differing:
            raise ValueError(
                f"resume: expected the data that the training in {str(work.parent)!r} began with, "
                f"got others ({', '.join(differing)}). Put those back, or start anew with --force"
            )
    elif state.is_main_process:
        write_json(file, data)


def publish(room: Path, work: Path, out: Path) -> None:
    """Move the files of `room` into `out`, the results last, and clear `work` away.

    Args:
        room: a finished model with its results, on the file system of `out`.
        work: of `claimed`; curves in it are kept.
        out: what an earlier model left there and this one lacks, is deleted.
    """
    out.mkdir(parents=True, exist_ok=True)
    names = sorted(file.name for file in room.iterdir())
    (out / RESULTS_FILE).unlink(missing_ok=True)
    for pattern in (*_RECORDS, *COMPANIONS, *WEIGHTS, "*.safetensors.index.json"):
        for file in out.glob(pattern):
            # What has a successor is replaced by it.
            if file.name not in names and file.is_file():
                file.unlink()
    shutil.rmtree(out / _FIGURES, ignore_errors=True)
    # Whoever finds results finds a whole model beside them.
    for name in sorted(names, key=lambda name: name == RESULTS_FILE):
        (room / name).replace(out / name)
    if (work / _CURVES).is_dir():
        shutil.rmtree(out / _CURVES, ignore_errors=True)
        (work / _CURVES).replace(out / _CURVES)
    shutil.rmtree(work)


def _check(out: Path, work: Path, settings: GeolipSettings) -> None:
    is_ours = (work / _SETTINGS_FILE).is_file()
    if settings.resume:
        _check_resumable(out, work, settings)
    elif is_ours and checkpoints_of(work) and not settings.force:
        raise ValueError(
            f"OUT: {str(out)!r} has the checkpoints of an unfinished training. --resume goes on "
            "with it, --force starts anew; or choose another folder"
        )
    elif (out / "config.json").is_file() or not is_ours:
        require_free(out, settings.force, _own_files(out) if is_ours else _own_files(out, ()))


def _check_resumable(out: Path, work: Path, settings: GeolipSettings) -> None:
    file = work / _SETTINGS_FILE
    if not file.is_file():
        if out.exists() and any(out.iterdir()):
            raise ValueError(
                f"resume: expected an unfinished training in {str(out)!r}, found none: it is done, "
                "or the folder is another's. Leave --resume out, and choose another folder"
            )
        return
    # As JSON has them.
    wanted = json.loads(json.dumps(settings.that_matter()))
    known = json.loads(file.read_text(encoding="utf-8"))
    differing = [
        f"{name}: {known.get(name)!r}, now {wanted.get(name)!r}"
        for name in sorted(known.keys() | wanted.keys())
        if known.get(name) != wanted.get(name)
    ]
    if differing:
        raise ValueError(
            f"resume: expected the settings that the training in {str(out)!r} began with, got "
            f"others ({'; '.join(differing)}). Give those, or choose another folder"
        )


def _own_files(out: Path, rooms: tuple[str, ...] = (WORK_FOLDER,)) -> set[Path]:
    """What this library puts beside a model, in `out` and in folders of it."""
    found = {out / name for name in _RECORDS if (out / name).is_file()}
    for folder in (_CURVES, _FIGURES, *rooms):
        found |= set((out / folder).rglob("*"))
    return found


def _clear_if_bare(work: Path, out: Path | None) -> None:
    """Delete a room that holds nothing but what says of which run it is; `out`, too, if empty."""
    if work.is_dir() and {file.name for file in work.iterdir()} <= {_SETTINGS_FILE, _DATA_FILE}:
        shutil.rmtree(work)
        if out is not None and not any(out.iterdir()):
            out.rmdir()
