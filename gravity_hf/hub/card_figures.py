"""The pictures of a card: what lies in the folder's figures, in the order of its list."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..viz.export import LIST_NAME as LIST
from .file_names import FIGURES_FOLDER as FOLDER

# What a Markdown page shows.
_PICTURES = (".png", ".svg", ".jpg", ".webp")


def read_figures(folder: Path, shown: str = FOLDER) -> list[dict[str, str]]:
    """`path`, `title` and `caption` of each picture that the folder lists and has.

    Args:
        folder: of the pictures.
        shown: what a card writes before a picture's name: the folder, as seen from the card.

    Raises:
        ValueError: a list that cannot be read, or a picture outside of the folder.
    """
    file = folder / LIST
    if not file.is_file():
        return []
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        pictures = [_picture(folder, shown, entry) for entry in entries]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{file}: expected a list of figures with name, file, title and caption, could not "
            f"read it ({error}). Draw them again with gravity-hf figures"
        ) from error
    return [picture for picture in pictures if picture is not None]


def _picture(folder: Path, shown: str, entry: dict[str, Any]) -> dict[str, str] | None:
    name = Path(entry["file"])
    if name.is_absolute() or ".." in name.parts:
        raise ValueError(f"a file inside {folder}, got {entry['file']!r}")
    if name.suffix not in _PICTURES or not (folder / name).is_file():
        return None
    return {
        "path": (Path(shown) / name).as_posix(),
        "title": entry["title"],
        "caption": entry["caption"],
    }
