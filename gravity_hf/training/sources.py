"""Where text to train on comes from: files, data sets by name or folder, the standard library."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from .corpus import load_corpus
from .text import read_text

_VALIDATION_SHARE = 0.1
_ROWS = 10_000
_SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
)


@dataclass(frozen=True)
class NamedDataset:
    """What `datasets.load_dataset` is called with, and what stands between two rows of text."""

    path: str
    config: str | None = None
    options: dict[str, Any] = field(default_factory=dict)
    between: str = ""


# Rows of WikiText are its lines, with their line ends.
DATASETS = {
    "wikitext103": NamedDataset("Salesforce/wikitext", "wikitext-103-raw-v1"),
    "wikitext2": NamedDataset("Salesforce/wikitext", "wikitext-2-raw-v1"),
    "tinyshakespeare": NamedDataset(
        "text", options={"data_files": _SHAKESPEARE, "sample_by": "document"}
    ),
}


class SplitText(NamedTuple):
    """Text to train on, other text to validate on, and where both come from."""

    train: str
    validation: str
    origin: str


def load_text(
    text_files: list[str] | None,
    dataset: str | None,
    dataset_config: str | None,
    text_column: str,
    train_bytes: int,
    validation_bytes: int,
) -> SplitText:
    """As `streams.load_stream` says it, before it is made into tokens.

    Raises:
        ValueError: two sources at once, a missing file or column.
        ImportError: a data set without the package that reads it.
    """
    if text_files and dataset:
        raise ValueError("data: expected --text_files or --dataset, got both. Leave one out")
    if dataset:
        found = _dataset_text(dataset, dataset_config, text_column, train_bytes, validation_bytes)
    elif text_files:
        found = _file_text([Path(file) for file in text_files])
    else:
        corpus = load_corpus(None, train_bytes, validation_bytes)
        train, validation = (
            bytes(part.numpy()).decode("utf-8", "replace")
            for part in (corpus.train, corpus.validation)
        )
        found = SplitText(train, validation, corpus.description)
    return found._replace(
        train=found.train[:train_bytes], validation=found.validation[:validation_bytes]
    )


def _dataset_text(
    name: str, config: str | None, column: str, train_bytes: int, validation_bytes: int
) -> SplitText:
    known = DATASETS.get(name, NamedDataset(name, between="\n\n"))
    splits = _load(known, config)
    for split, rows in splits.items():
        if column not in rows.column_names:
            raise ValueError(
                f"--text_column: expected a column of {name} ({split}), got {column!r}; there are "
                f"{rows.column_names}"
            )
    held_out = next((part for part in ("validation", "test") if part in splits), None)
    if held_out is None:
        whole = _joined(splits["train"], column, known.between, train_bytes + validation_bytes)
        return SplitText(*_split(whole), f"dataset {name}, the last tenth held out")
    return SplitText(
        _joined(splits["train"], column, known.between, train_bytes),
        _joined(splits[held_out], column, known.between, validation_bytes),
        f"dataset {name}, its {held_out} split",
    )


def _load(known: NamedDataset, config: str | None) -> Any:
    # Imported here because datasets is optional.
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ImportError(
            "--dataset needs the package datasets, which is not installed: pip install datasets. "
            "Or give --text_files"
        ) from error
    return load_dataset(known.path, config or known.config, **known.options)


def _joined(rows: Any, column: str, between: str, most: int) -> str:
    """The rows' text up to about `most` characters: what nobody asked for is not read."""
    return between.join(_up_to(rows, column, most))


def _up_to(rows: Any, column: str, most: int) -> Iterator[str]:
    total = 0
    for batch in rows.select_columns([column]).iter(batch_size=_ROWS):
        for text in batch[column]:
            yield text
            total += len(text)
            if total >= most:
                return


def _file_text(files: list[Path]) -> SplitText:
    parts = [_split(read_text(file)) for file in files]
    train, validation = ("\n\n".join(part[side] for part in parts) for side in (0, 1))
    names = ", ".join(file.name for file in files)
    return SplitText(train, validation, f"{names}, the last tenth held out")


def _split(text: str) -> tuple[str, str]:
    cut = int(len(text) * (1 - _VALIDATION_SHARE))
    return text[:cut], text[cut:]
