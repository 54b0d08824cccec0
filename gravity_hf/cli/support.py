"""`gravity-hf support`: which model types of transformers run gravity, and why others do not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from .console import make_console

if TYPE_CHECKING:
    from ..integration.support_table import SupportRecord, SupportTable


def support(
    model_type: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL_TYPE]",
            help="As in config.json, such as qwen2; left out: all, by kind of model.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Say what is known about MODEL_TYPE, or how many model types run gravity.

    Every model type of transformers was built small, patched and held to the same promises.

    Example:

        gravity-hf support qwen2
    """
    from ..integration.support_table import support_table

    console = make_console()
    table = support_table()
    if model_type is None:
        _show_summary(console, table)
    else:
        _show_record(console, table.of(model_type.removeprefix("gravity_")))
    versions = table.versions
    console.print(
        f"  examined with transformers {versions['transformers']}, torch {versions['torch']}, "
        f"{table.date}",
        markup=False,
    )


def _show_summary(console: Console, table: SupportTable) -> None:
    from ..integration.support_table import SUMMARY_HEADERS, summary, unreached

    shown = Table(box=None, padding=(0, 1), header_style="bold")
    for column, title in enumerate(SUMMARY_HEADERS):
        shown.add_column(title, justify="right" if column else "left", no_wrap=not column)
    for row in summary(table):
        shown.add_row(*row)
    console.print(shown)
    console.print(f"  {unreached(table)}", markup=False)


def _show_record(console: Console, record: SupportRecord) -> None:
    from ..integration.support_table import PROMISES, STATUSES

    console.print(f"[bold]{record.model_type}[/bold]: {record.status}, {STATUSES[record.status]}")
    lines = [f"kind: {record.category}" + (f", {record.model}" if record.model else "")]
    if record.reason:
        lines.append(f"reason: {record.reason}")
    if record.reached:
        lines.append(f"gravity in: {', '.join(record.reached)}")
    if record.not_reached:
        places = ", ".join(record.not_reached)
        count = len(record.not_reached)
        lines.append(f"not reached by the inputs, {count} of the places of attention: {places}")
    if record.own_attention:
        lines.append(f"own attention, left as it is: {', '.join(record.own_attention)}")
    if record.cosine is not None:
        lines.append(f"calibrated, lowest cosine to the host: {record.cosine:.4f}")
    lines += [f"{name}: {outcome} ({PROMISES[name]})" for name, outcome in record.promises.items()]
    for line in lines:
        console.print(f"  {line}", markup=False)
