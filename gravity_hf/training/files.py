"""Files that are written whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(file: Path, content: Any) -> Path:
    """As `write_text`, of JSON."""
    return write_text(file, json.dumps(content, indent=2) + "\n")


def write_text(file: Path, content: str) -> Path:
    """Under another name first, then renamed; folders on the way are made. The file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    unfinished = file.with_name(f".{file.name}.tmp")
    unfinished.write_text(content, encoding="utf-8")
    unfinished.replace(file)
    return file
