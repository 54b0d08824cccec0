"""How README's tables are written: rows as Markdown, and below them where they were measured."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

NONE = "–"

Table = tuple[list[str], list[list[str]]]
Rows = list[dict[str, Any]]


def markdown(headers: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text and whose other columns are numbers."""
    rule = ["---", *["---:"] * (len(headers) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [headers, rule, *rows]) + "\n"


def benchmark_conditions(known: dict[str, Any]) -> str:
    """Device, threads where they matter, versions, commit and day of a benchmark, in one line."""
    versions = known["versions"]
    names = {"torch": "torch", "triton": "Triton", "cudnn": "cuDNN"}
    parts = [f"{title} {versions[name]}" for name, title in names.items() if versions[name]]
    if "threads" in known:
        count = known["threads"]
        parts.insert(0, f"{count} thread{'s' if count > 1 else ''}")
    commit = f"commit {known['commit'][:10]}"
    return ", ".join([known["device"], *parts, commit, known["date"][:10]]) + "."


def experiment_conditions(rows: Rows) -> str:
    """Devices of all rows of an experiment, versions and day of the last one, with the lines around
    it."""
    known = rows[-1]["conditions"]
    versions = known["versions"]
    named = [row["conditions"].get("devices", [row["conditions"]["device"]]) for row in rows]
    devices = " and ".join(dict.fromkeys(device for each in named for device in each))
    return (
        f"\n{devices}, torch {versions['torch']}, transformers "
        f"{versions['transformers']}, {known['date'][:10]}.\n"
    )


def contents(folder: Path, stem: str, command: str, kinds: Iterable[str] = ("cuda", "cpu")) -> Rows:
    """What was measured on each device or host; `kinds` ends the name of each file, "" is the bare
    name.

    Raises:
        FileNotFoundError: on none; with the command that measures.
    """
    names = [f"{stem}_{kind}.json" if kind else f"{stem}.json" for kind in kinds]
    files = [folder / name for name in names if (folder / name).is_file()]
    if not files:
        raise FileNotFoundError(
            f"{' or '.join(names)}: has not been measured yet: make it with `python {command}`"
        )
    return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def result_file(folder: Path, name: str, command: str) -> str:
    """The text of a result file.

    Raises:
        FileNotFoundError: with the command that makes it.
    """
    file = folder / name
    if not file.is_file():
        raise FileNotFoundError(f"{name} has not been measured yet: make it with `{command}`")
    return file.read_text(encoding="utf-8")


def result_json(folder: Path, name: str, command: str) -> dict[str, Any]:
    """`result_file` of one JSON object."""
    return json.loads(result_file(folder, name, command))
