"""The folder of an edge export: a folder for each format, and `edge.json`."""

from __future__ import annotations

import json
from pathlib import Path

EDGE_FILE = "edge.json"


def require_free_edge(out: Path, force: bool) -> None:
    """Refuse an `out` that holds anything, unless `force` and it is an edge export alone.

    Raises:
        ValueError: a file, or a folder with anything that would be lost.
    """
    if out.is_file():
        raise ValueError(f"OUT: expected a folder, {str(out)!r} is a file. Choose another name")
    if not out.exists() or not any(out.iterdir()):
        return
    if not force:
        raise ValueError(
            f"OUT: expected a new or empty folder, {str(out)!r} is not empty. Choose another name, "
            "or say force (--force) to replace the edge export in it"
        )
    foreign = sorted({entry.name for entry in out.iterdir()} - _own(out))
    if foreign:
        raise ValueError(
            f"OUT: force replaces an edge export and nothing else, {str(out)!r} also holds "
            f"{', '.join(foreign[:5])}. Choose another name, or empty it yourself"
        )


def _own(out: Path) -> set[str]:
    """Names in `out` that an edge export wrote; none where its report cannot be read."""
    try:
        report = json.loads((out / EDGE_FILE).read_text(encoding="utf-8"))
        return {EDGE_FILE, *(export["format"] for export in report["exports"])}
    except (OSError, ValueError, KeyError, TypeError):
        return set()
