"""How README's tables are written: rows as Markdown, and below them where they were measured."""

from __future__ import annotations

from typing import Any


def markdown(headers: list[str], rows: list[list[str]]) -> str:
    """A table whose first column is text and whose other columns are numbers."""
    rule = ["---", *["---:"] * (len(headers) - 1)]
    return "\n".join("| " + " | ".join(line) + " |" for line in [headers, rule, *rows]) + "\n"


def benchmark_conditions(known: dict[str, Any]) -> str:
    """Device, versions, commit and day of a benchmark, in one line."""
    versions = known["versions"]
    names = {"torch": "torch", "triton": "Triton", "cudnn": "cuDNN"}
    parts = [f"{title} {versions[name]}" for name, title in names.items() if versions[name]]
    commit = f"commit {known['commit'][:10]}"
    return ", ".join([known["device"], *parts, commit, known["date"][:10]]) + "."
