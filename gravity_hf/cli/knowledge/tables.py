"""Beliefs and facts as tables on the screen."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..terminal import terminal_safe

if TYPE_CHECKING:
    from ...knowledge.belief import Belief

_LONGEST = 60


def show_table(
    console: Console, titles: Sequence[str], rows: Iterable[Sequence[object]], numbers: int = 0
) -> None:
    """Print rows of plain text; the last `numbers` columns are set to the right."""
    table = Table(box=None, padding=(0, 2), header_style="bold")
    for i, title in enumerate(titles):
        is_number = i >= len(titles) - numbers
        table.add_column(title, justify="right" if is_number else "left")
    for row in rows:
        table.add_row(*(Text(terminal_safe(str(cell), console.encoding)) for cell in row))
    console.print(table)


def statement(belief: Belief) -> str:
    """What a belief says, in a line."""
    fact = belief.fact
    if fact is not None:
        return f"{shortened(fact.prompt)} → {fact.answer}"
    facts = belief.metadata.get("consolidated") or ()
    return f"({len(facts)} facts)" if facts else "(a delta without a fact)"


def shortened(text: str) -> str:
    """The end of a long prompt says more than its beginning."""
    return text if len(text) <= _LONGEST else f"... {text[4 - _LONGEST :]}"


def measure(values: dict[str, Any], name: str) -> str:
    """A share, a number or yes and no; empty where it was not measured."""
    value = values.get(name)
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4f}" if name.startswith("kl") else f"{value:.2f}"


def show_encoded(console: Console, beliefs: Sequence[Belief]) -> None:
    """What the encoder measured, for each of a few beliefs and together."""
    reports = [belief.report for belief in beliefs]
    if len(beliefs) <= 20:
        rows = [
            (b.key, statement(b), *(measure(r, x) for x in ("exact_before", *_MEASURES)))
            for b, r in zip(beliefs, reports, strict=True)
        ]
        titles = ("key", "fact", "known before", "exact", "paraphrases", "KL elsewhere")
        show_table(console, titles, rows, numbers=4)
    count = len(beliefs)
    known = sum(bool(r.get("exact_before")) for r in reports)
    exact = sum(bool(r.get("exact")) for r in reports)
    held_out = [r["paraphrase_top1"] for r in reports if r.get("paraphrase_top1") is not None]
    line = f"{count} beliefs: {exact} answered exactly, {known} of all were before"
    if held_out:
        line += f"; held-out paraphrases {sum(held_out) / len(held_out):.0%}"
    console.print(line, markup=False)


_MEASURES = ("exact", "paraphrase_top1", "kl_unrelated")
