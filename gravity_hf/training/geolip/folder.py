"""The folder of a training: a room for what is unfinished, and the model once it is done."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..files import write_json
from ..folders import require_free
from ..recipe import checkpoints_of
from .history import ALPHAS_FILE, DEVIATIONS_FILE
from .settings import GeolipSettings

__all__ = ["RESULTS_FILE", "SAMPLES_FILE", "WORK_FOLDER", "claimed", "publish"]

RESULTS_FILE = "results.json"
SAMPLES_FILE = "samples.safetensors"
WORK_FOLDER = "work"
# By this file a room is known to be one.
_SETTINGS_FILE = "geolip_training.json"
# Of TensorBoard, where Trainer puts them.
_CURVES = "runs"
_CARD, _FIGURES = "README.md", "figures"


@contextmanager
def claimed(settings: GeolipSettings, is_main: bool = True) -> Iterator[Path]:
    """The room for checkpoints, `OUT/work`, or one that is gone afterwards where nothing is kept.

    Args:
        settings: `out`, `resume`, `force`, and all that a resumed run must have in common.
        is_main: of the processes of a run one clears and writes.

    Raises:
        ValueError: `out` holds another model, or a run that this one does not go on with.
    """
    if settings.out is None:
        with tempfile.TemporaryDirectory() as room:
            yield Path(room)
        return
    out = Path(settings.out)
    work = out / WORK_FOLDER
    _check(out, work, settings)
    if is_main:
        if not settings.resume:
            shutil.rmtree(work, ignore_errors=True)
        write_json(work / _SETTINGS_FILE, settings.that_matter())
    yield work


def publish(room: Path, work: Path, out: Path) -> None:
    """Move the files of `room` into `out`, the results last, and clear `work` away.

    Args:
        room: a finished model with its results, on the file system of `out`.
        work: of `claimed`; curves in it are kept.
        out: what an earlier model left there and this one lacks, is deleted.
    """
    out.mkdir(parents=True, exist_ok=True)
    names = sorted(file.name for file in room.iterdir())
    for file in (RESULTS_FILE, SAMPLES_FILE, ALPHAS_FILE, DEVIATIONS_FILE, _CARD):
        (out / file).unlink(missing_ok=True)
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
    names = (RESULTS_FILE, SAMPLES_FILE, ALPHAS_FILE, DEVIATIONS_FILE, _CARD)
    found = {out / name for name in names if (out / name).is_file()}
    for folder in (_CURVES, _FIGURES, *rooms):
        found |= set((out / folder).rglob("*"))
    return found
