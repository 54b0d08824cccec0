"""Words that follow from numbers."""

from __future__ import annotations


def counted(count: int, noun: str, plural: str | None = None) -> str:
    """`1 mass`, `12 masses`: the plural is regular where none is given."""
    if count == 1:
        return f"1 {noun}"
    ending = "es" if noun.endswith(("s", "ch")) else "s"
    return f"{count:,} {plural or noun + ending}"
