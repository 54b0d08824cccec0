"""Paragraphs whose features a geolip learns: of files, of a data set, of Python's own help."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..sources import DATASETS, NamedDataset
from ..text import embedded_english, prose_paragraphs, read_text
from .records import name_of_source

__all__ = ["Texts", "load_texts", "paragraphs_of", "texts_of"]

# A shorter paragraph is a heading or a caption.
_SHORTEST = 40
_HEADING = re.compile(r"^ ?= .+ = ?$", re.MULTILINE)
_BLANK_LINES = re.compile(r"\n\s*\n")
_SPLITS = ("train", "validation", "test")
_ALIASES = {"wikitext": "wikitext2"}


@dataclass(frozen=True)
class Texts:
    """`paragraphs`: all different. `description`: one line. `digest`: of the paragraphs."""

    paragraphs: tuple[str, ...]
    description: str
    digest: str


def load_texts(
    files: Iterable[str | Path] | None = None,
    dataset: str | None = None,
    *,
    dataset_config: str | None = None,
    column: str = "text",
    count: int | None = None,
    seed: int = 0,
) -> Texts:
    """Paragraphs of text files, of a data set, or of the help that every Python carries.

    Args:
        files: text; see `paragraphs_of`.
        dataset: `"wikitext"` (WikiText-2), another name of `training.sources.DATASETS`, or a name
            or folder for `datasets.load_dataset`, whose training split is read.
        dataset_config: its configuration.
        column: its column of text.
        count: at most so many paragraphs, drawn by `seed`. None: all there are.
        seed: of that draw.

    Raises:
        ValueError: two sources, a file or column that is not there, or fewer than 2 paragraphs.
        ImportError: a data set without the package that reads it.
    """
    if files and dataset:
        raise ValueError("text: expected files or a data set, got both. Leave one out")
    if dataset:
        found = _of_dataset(dataset, dataset_config, column, count, seed)
        origin = f"data set {name_of_source(dataset)}"
    elif files:
        places = [Path(file) for file in files]
        found = [p for place in places for p in paragraphs_of(read_text(place))]
        origin = ", ".join(place.name for place in places)
    else:
        found = prose_paragraphs(embedded_english())
        origin = "the language reference behind Python's help()"
    found = _distinct(found, origin)
    if count is not None and count < len(found):
        found = random.Random(seed).sample(found, count)
    return Texts(tuple(found), f"{len(found)} paragraphs of {origin}", _digest(found))


def texts_of(texts: Iterable[str]) -> Texts:
    """Texts that are given, each once.

    Raises:
        ValueError: fewer than 2 different ones.
    """
    found = _distinct(texts, "the given texts")
    return Texts(tuple(found), f"{len(found)} given texts", _digest(found))


def paragraphs_of(text: str) -> list[str]:
    """Paragraphs of at least 40 characters, their white space single.

    A text with headings as WikiText has them, `= Title =`, has a paragraph on each other line;
    elsewhere blank lines stand between paragraphs.
    """
    parts = text.splitlines() if _HEADING.search(text) else _BLANK_LINES.split(text)
    found = (" ".join(part.split()) for part in parts if not _HEADING.match(part))
    return [paragraph for paragraph in found if len(paragraph) >= _SHORTEST]


def _distinct(texts: Iterable[str], origin: str) -> list[str]:
    found = list(dict.fromkeys(texts))
    if len(found) < 2:
        raise ValueError(
            f"text: expected at least 2 different paragraphs in {origin}, to learn from and to "
            f"hold out, got {len(found)}; what is shorter than {_SHORTEST} characters is none. "
            "Give more text"
        )
    return found


def _of_dataset(
    name: str, config: str | None, column: str, count: int | None, seed: int
) -> list[str]:
    found: dict[str, None] = {}
    for text in _rows(name, config, column, count, seed):
        found.update(dict.fromkeys(paragraphs_of(text)))
        if count is not None and len(found) >= count:
            break
    return list(found)


def _rows(
    name: str, config: str | None, column: str, count: int | None, seed: int
) -> Iterator[str]:
    # Imported here because datasets is optional.
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            "dataset: needs the package datasets, which is not installed: pip install datasets. "
            "Or give text files"
        ) from error
    known = DATASETS.get(_ALIASES.get(name, name), NamedDataset(name))
    try:
        splits: Any = load_dataset(known.path, config or known.config, **known.options)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"dataset: expected 'wikitext', or the name or folder of a data set, got {name!r}, "
            f"which cannot be loaded ({error}). Text files need no data set: --text FILE"
        ) from error
    split = next((part for part in _SPLITS if part in splits), None)
    if split is None or column not in splits[split].column_names:
        have = splits[split].column_names if split else list(splits)
        raise ValueError(
            f"dataset: expected {name} to have one of the splits {list(_SPLITS)} with a column "
            f"{column!r}, it has {have}"
        )
    rows = splits[split].select_columns([column])
    # From all over it, where not all of it is read.
    rows = rows if count is None else rows.shuffle(seed=seed)
    for batch in rows.iter(batch_size=1000):
        yield from batch[column]


def _digest(paragraphs: list[str]) -> str:
    return hashlib.sha256("\0".join(paragraphs).encode()).hexdigest()[:16]
