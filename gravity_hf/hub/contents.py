"""Which files of an exported folder go to the Hub, and which stay at home."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ..training.folders import BEST, LAST, VALIDATION_FILE

# Where `gravity-hf convert` keeps its steps.
WORK_FOLDER = "work"
_CACHES = ("__pycache__",)
# What a Trainer leaves beside the weights: pickles, and the paths of the machine; and inputs that
# a geolip's training leaves for its figures, which may be private.
TRAINER_FILES = re.compile(
    r"samples\.safetensors|training_args\.bin|(trainer_state|pretrain_settings)\.json"
    r"|(optimizer|scheduler|scaler)\.(pt|bin)|rng_state(_\d+)?\.pth"
)
# Files of curves carry the name of the machine.
_TRAINER_FOLDERS = re.compile(r"checkpoint-\d+|runs")


@dataclass(frozen=True)
class Contents:
    """`files`: paths relative to the folder, in order. `left_out`: names that stay at home."""

    files: tuple[PurePosixPath, ...]
    left_out: tuple[str, ...]


def contents_of(folder: Path) -> Contents:
    """What of `folder` goes to the Hub: everything but hidden files, caches, `work/`, a Trainer's
    own files, curves and checkpoints, inputs kept for figures, and the models `best/` and `last/`
    that a training keeps beside it.

    Raises:
        ValueError: there is no such folder, or it holds a link that leads out of it.
    """
    if not folder.is_dir():
        raise ValueError(f"expected a folder that holds an exported model, got {str(folder)!r}")
    left_out: list[str] = []
    paths = _walk(folder, folder.resolve(), left_out)
    files = sorted(PurePosixPath(path.relative_to(folder).as_posix()) for path in paths)
    return Contents(tuple(files), tuple(sorted(left_out)))


def _walk(folder: Path, root: Path, left_out: list[str], inside: str = "") -> Iterator[Path]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = inside + entry.name
        if _stays(name, entry):
            left_out.append(name + "/" if entry.is_dir(follow_symlinks=False) else name)
            continue
        path = Path(entry.path)
        if entry.is_symlink() and (path.is_dir() or root not in path.resolve().parents):
            raise ValueError(
                f"{path}: expected a file, got a link to {path.resolve()}, which is not in the "
                f"folder. Copy the folder with its files, for example: cp -rL {folder} copy"
            )
        if entry.is_dir():
            yield from _walk(path, root, left_out, name + "/")
        elif entry.is_file():
            yield path


def _stays(name: str, entry: os.DirEntry[str]) -> bool:
    if entry.name.startswith(".") or entry.name in _CACHES:
        return True
    # The rest is looked for at the top, where it is written.
    if entry.is_dir():
        kept = name in (BEST, LAST) and Path(entry.path, VALIDATION_FILE).is_file()
        return kept or name == WORK_FOLDER or _TRAINER_FOLDERS.fullmatch(name) is not None
    return TRAINER_FILES.fullmatch(name) is not None
