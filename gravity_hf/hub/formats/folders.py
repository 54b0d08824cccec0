"""What lies in the folder of an export beside its weights."""

from __future__ import annotations

import shutil
from pathlib import Path

from ...training.folders import COMPANIONS
from .modules import module_files


def copy_companions(source: Path, target: Path) -> None:
    """Copy settings, tokenizer, code and further modules; what `target` has is not replaced."""
    found = [file for pattern in COMPANIONS for file in source.glob(pattern)]
    for file in (*found, *module_files(source)):
        place = target / file.relative_to(source)
        if file.is_file() and not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)


def bytes_of(folder: Path, *patterns: str) -> int:
    """Size on disk of the files that match."""
    files = {file for pattern in patterns for file in folder.glob(pattern)}
    return sum(file.stat().st_size for file in files)
