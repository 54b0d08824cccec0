"""`gravity-hf beliefs`: its verbs."""

from __future__ import annotations

import typer

from . import asking, changing, exchanging, making, reading

beliefs = typer.Typer(
    help="Teach a model facts, as beliefs that can be changed, checked and taken back.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

beliefs.command(name="create")(making.create)
beliefs.command(name="add")(making.add)
beliefs.command(name="add-bank")(making.add_bank)
beliefs.command(name="update")(making.update)
beliefs.command(name="remove")(changing.remove)
beliefs.command(name="list")(reading.list_beliefs)
beliefs.command(name="history")(reading.history)
beliefs.command(name="rollback")(changing.rollback)
beliefs.command(name="verify")(reading.verify)
beliefs.command(name="calibrate")(changing.calibrate)
beliefs.command(name="ask")(asking.ask)
beliefs.command(name="quantize")(changing.quantize)
beliefs.command(name="consolidate")(changing.consolidate)
beliefs.command(name="export")(exchanging.export)
beliefs.command(name="import")(exchanging.import_adapter)
beliefs.command(name="convert-delta")(exchanging.convert_delta)
