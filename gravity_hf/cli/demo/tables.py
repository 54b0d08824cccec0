"""The demonstration's tables, once as cells, then for the terminal, for markdown and for HTML."""

from __future__ import annotations

from html import escape
from typing import Any, NamedTuple

from rich.table import Table

from .heal import CALIBRATED, CONSTANTS, CONTROL, TITLES, Outcome

NOTHING = "–"


class Cells(NamedTuple):
    """`rows` of text under `headers`; the first `text_columns` hold words, the others numbers.
    `marked`: index of the row that the table is about."""

    headers: list[str]
    rows: list[list[str]]
    text_columns: int
    marked: int | None = None


def loss_cells(outcomes: dict[str, Outcome]) -> Cells:
    """Validation loss of every conversion, before and after its heal."""
    control = outcomes[CONTROL].healed
    rows = [
        [
            TITLES[key],
            CONSTANTS[key],
            f"{outcome.converted:.3f}",
            f"{outcome.healed:.3f}",
            f"{outcome.healed - control:+.3f}",
            _number(outcome.summary.get("softness"), "g"),
            _number(outcome.summary.get("contrast_median"), ".3g"),
        ]
        for key, outcome in outcomes.items()
    ]
    headers = ["attention", "constants", "converted", "healed", "vs host", "softness", "contrast"]
    marked = list(outcomes).index(CALIBRATED) if CALIBRATED in outcomes else None
    return Cells(headers, rows, text_columns=2, marked=marked)


def encoder_cells(rows: list[dict[str, Any]]) -> Cells:
    """Likeness of the converted encoder's embeddings to the original's."""
    cells = [
        [
            row["name"],
            f"{row['cosine_mean']:.4f}",
            f"{row['cosine_min']:.4f}",
            f"{row['spearman']:.4f}",
            f"{row['same_neighbour']:.2f}",
            _number(row["contrast_median"], ".3g"),
        ]
        for row in rows
    ]
    headers = ["attention", "mean cosine", "lowest", "Spearman", "same neighbour", "contrast"]
    return Cells(headers, cells, text_columns=1)


def head_cells(rows: tuple[dict[str, Any], ...]) -> Cells:
    """What calibration found, one row per head."""
    numbers = ("mean_distance", "mass", "softening", "key_radius_sq", "contrast", "kl")
    cells = [
        [row["layer"], str(row["head"]), *(_number(row[name], ".4g") for name in numbers)]
        for row in rows
    ]
    headers = ["layer", "head", "mean d²", "mass M", "softening ε", "key radius²", "contrast"]
    return Cells([*headers, "KL to host"], cells, text_columns=1)


def to_rich(cells: Cells, without: str | None = None) -> Table:
    """For the terminal; `without` names a column that would not fit in 80 characters."""
    kept = [i for i, header in enumerate(cells.headers) if header != without]
    table = Table(box=None, padding=(0, 1), header_style="bold")
    for i in kept:
        table.add_column(cells.headers[i], justify="left" if i < cells.text_columns else "right")
    for index, row in enumerate(cells.rows):
        table.add_row(*(row[i] for i in kept), style="bold" if index == cells.marked else None)
    return table


def to_markdown(cells: Cells) -> str:
    rule = ["---" if i < cells.text_columns else "---:" for i in range(len(cells.headers))]
    rows = [
        [f"**{cell}**" for cell in row] if index == cells.marked else row
        for index, row in enumerate(cells.rows)
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in [cells.headers, rule, *rows])


def to_html(cells: Cells) -> str:
    def line(tag: str, row: list[str]) -> str:
        return "".join(
            f"<{tag}{'' if i < cells.text_columns else ' class=n'}>{escape(cell)}</{tag}>"
            for i, cell in enumerate(row)
        )

    body = "".join(
        f"<tr{' class=marked' if index == cells.marked else ''}>{line('td', row)}</tr>"
        for index, row in enumerate(cells.rows)
    )
    return (
        f"<div class=scroll><table><thead><tr>{line('th', cells.headers)}</tr></thead>"
        f"<tbody>{body}</tbody></table></div>"
    )


def _number(value: float | None, form: str) -> str:
    return NOTHING if value is None else format(value, form)
