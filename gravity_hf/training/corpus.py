"""Bytes to train on and other bytes to measure on, from text that every machine has."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .text import read_text

# Not the library's own prose and code: third parties, tests, tables, generated text.
EXCLUDED = frozenset(
    (
        *("site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "pydoc_data"),
        *("turtledemo", "tkinter", "encodings", "distutils", "ensurepip", "__pycache__"),
    )
)
# Separates files; no source file contains it.
SEPARATOR = b"\0"
_VALIDATION_SHARE = 0.1


@dataclass(frozen=True)
class Corpus:
    """`train`, `validation`: uint8 `[bytes]`. `description`: one line. `digest`: of both."""

    train: Tensor
    validation: Tensor
    description: str
    digest: str


def load_corpus(files: list[Path] | None, train_bytes: int, validation_bytes: int) -> Corpus:
    """The standard library's source split by file, or the user's files split within each."""
    if files:
        parts = [_split_text(read_text(file).encode()) for file in files]
        train, validation = ([part[i] for part in parts] for i in (0, 1))
        origin = f"{len(files)} text file(s), the last tenth of each held out"
    else:
        train_files, validation_files = split_by_file(stdlib_root())
        train = [file.read_bytes() for file in train_files]
        validation = [file.read_bytes() for file in validation_files]
        origin = (
            f"Python standard library, {len(train)} files to train, {len(validation)} others to "
            "validate"
        )
    return _corpus(train, validation, train_bytes, validation_bytes, origin)


def stdlib_root() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def split_by_file(root: Path) -> tuple[list[Path], list[Path]]:
    """Source files under `root`: those to train on, those to validate on.

    A file's own relative path decides, so the split is the same everywhere and no file is on both
    sides. The order is that of the hash, too, so that a byte cap cuts no alphabetical tail.
    """
    keyed = sorted((_hash(file.relative_to(root)), file) for file in _sources(root))
    limit = int(_VALIDATION_SHARE * 2**32)
    # Validation is decided by other bits than the order, which must not depend on it.
    validation = [file for key, file in keyed if int(key[-8:], 16) < limit]
    train = [file for key, file in keyed if int(key[-8:], 16) >= limit]
    return train, validation


def random_windows(data: Tensor, count: int, length: int, generator: torch.Generator) -> Tensor:
    """Ids `[count, length]` from random places."""
    starts = torch.randint(0, data.numel() - length, (count,), generator=generator)
    return _windows(data, starts, length)


def even_windows(data: Tensor, count: int, length: int) -> Tensor:
    """Ids `[count, length]` from evenly spaced places: the same ones every time."""
    return _windows(data, torch.linspace(0, data.numel() - length, count).long(), length)


def _windows(data: Tensor, starts: Tensor, length: int) -> Tensor:
    return torch.stack([data[start : start + length] for start in starts.tolist()]).long()


def _sources(root: Path) -> Iterator[Path]:
    for file in root.rglob("*.py"):
        if EXCLUDED.isdisjoint(file.relative_to(root).parts):
            yield file


def _hash(path: Path) -> str:
    return hashlib.sha256(path.as_posix().encode()).hexdigest()


def _split_text(text: bytes) -> tuple[bytes, bytes]:
    cut = int(len(text) * (1 - _VALIDATION_SHARE))
    return text[:cut], text[cut:]


def _corpus(
    train: list[bytes], validation: list[bytes], train_cap: int, validation_cap: int, origin: str
) -> Corpus:
    first = SEPARATOR.join(train)[:train_cap]
    second = SEPARATOR.join(validation)[:validation_cap]
    if min(len(first), 9 * len(second)) < 100_000:
        raise ValueError(
            f"--text: expected at least 100 kB to train on and a tenth of that to validate on, got "
            f"{len(first)} and {len(second)} bytes. Give more text, or leave --text out"
        )
    megabytes = f"{len(first) / 1e6:.1f} MB / {len(second) / 1e6:.1f} MB"
    return Corpus(
        train=_tensor(first),
        validation=_tensor(second),
        description=f"{origin} ({megabytes})",
        digest=hashlib.sha256(first + SEPARATOR + second).hexdigest()[:16],
    )


def _tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
