"""Reading and writing the JSON of facts, within bounds and without half a file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from ..runtime.encoding import parsed_json
from .errors import ValidationError

LARGEST_FILE = 64 * 2**20  # bytes; a fact is about one KiB


def read_json(path: Path) -> object:
    """The one JSON value in a file.

    Raises:
        FileNotFoundError: no such file.
        ValidationError: larger than `LARGEST_FILE`, not UTF-8 or not JSON.
    """
    return _parsed(_text(path), str(path))


def read_rows(path: Path) -> Iterator[tuple[str, object]]:
    """The items of a `.json` list or the lines of a `.jsonl` file, empty ones left out.

    Yields:
        What a message calls the place, and the JSON value.

    Raises:
        ValidationError: see `read_json`; or the `.json` holds no list.
    """
    if path.suffix == ".jsonl":
        for i, line in enumerate(_text(path).split("\n"), 1):
            if line.strip():
                yield f"{path}, line {i}", _parsed(line, f"{path}, line {i}")
        return
    rows = read_json(path)
    if not isinstance(rows, list):
        raise ValidationError(
            f"{path}: expected a list of facts, got {type(rows).__name__}. A file in a published "
            "schema is read by convert_published_facts"
        )
    for i, row in enumerate(rows, 1):
        yield f"{path}, fact {i}", row


def write_lines(rows: Iterable[object], path: Path) -> None:
    """One line of JSON for each row: the whole file or, after a crash, the older one."""
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.unfinished")
    try:
        with unfinished.open("w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{_line(row)}\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _line(row: object) -> str:
    # Letters stay letters: people read these files and their differences.
    return json.dumps(row, ensure_ascii=False, allow_nan=False)


def _text(path: Path) -> str:
    if (size := path.stat().st_size) > LARGEST_FILE:
        raise ValidationError(
            f"{path}: expected at most {LARGEST_FILE} bytes, got {size}. Split it into several"
        )
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValidationError(f"{path}: expected text in UTF-8, got other bytes") from error


def _parsed(text: str, where: str) -> object:
    try:
        return parsed_json(text)
    except ValueError as error:
        raise ValidationError(f"{where}: expected JSON, got something else: {error}") from error
