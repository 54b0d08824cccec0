"""Text to calibrate and to measure on: the user's files, or what every Python carries with it."""

from __future__ import annotations

import random
import re
from pathlib import Path

_BLANK_LINES = re.compile(r"\n\s*\n")


def read_texts(files: list[Path] | None) -> str:
    """The files' content, joined; without files the English of the standard library's help."""
    if not files:
        return embedded_english()
    return "\n\n".join(read_text(file) for file in files)


def read_text(file: Path) -> str:
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise ValueError(
            f"--text: expected a readable text file, got {str(file)!r} ({error.strerror}). "
            "Leave --text out to use the standard library's own text"
        ) from error
    if not text.strip():
        raise ValueError(f"--text: expected a file with text in it, {str(file)!r} is empty")
    return text


def embedded_english() -> str:
    """The language reference behind `help()`: 0.46 MB, offline, on every machine with Python."""
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))


def prose_paragraphs(text: str, minimum: int = 160) -> list[str]:
    """Distinct paragraphs of at least `minimum` characters that are mostly words, in text order.

    Distinct, because the same paragraph on both sides of a calibration split would leak.
    """
    found = (" ".join(block.split()) for block in _BLANK_LINES.split(text))
    return list(dict.fromkeys(p for p in found if len(p) >= minimum and _is_prose(p)))


def disjoint_samples(
    paragraphs: list[str], count: int, seed: int = 0
) -> tuple[list[str], list[str]]:
    """`count` paragraphs to calibrate on and `count` others to evaluate on."""
    if len(paragraphs) < 2 * count:
        raise ValueError(
            f"--text: expected at least {2 * count} paragraphs of prose ({count} to calibrate, as "
            f"many others to measure), got {len(paragraphs)}. Give more text, or fewer samples"
        )
    chosen = random.Random(seed).sample(paragraphs, 2 * count)
    return chosen[:count], chosen[count:]


def _is_prose(paragraph: str) -> bool:
    letters = sum(c.isalpha() or c == " " for c in paragraph)
    return letters >= 0.85 * len(paragraph)
