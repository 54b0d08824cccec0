"""`gravity-hf ledger`: whether the log of an agent is what was logged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .console import make_console

EXIT_BROKEN = 1

ledger = typer.Typer(
    help="Look after the ledgers that gravity models log to.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@ledger.callback()
def _verbs() -> None:
    pass


@ledger.command()
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A ledger's .jsonl file.")],
    anchor: Annotated[
        str | None,
        typer.Option(
            metavar="COUNT:HASH",
            help="Where the ledger ended at some time, noted elsewhere; shows even a rewritten "
            "file.",
            show_default=False,
        ),
    ] = None,
    key_env: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The environment variable with the key of the chain, where it has one.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Check every line of FILE: edited, removed, inserted, moved or cut off.

    Changes nothing. Exit code 0 where the chain holds, 1 where it does not.

    Example:

        gravity-hf ledger verify run/ledger.jsonl

        AUDIT_KEY=... gravity-hf ledger verify run/audit.jsonl --key-env AUDIT_KEY
    """
    from ..runtime.ledger_key import key_from_environment
    from ..runtime.verification import verify as check

    key = None if key_env is None else key_from_environment(key_env)
    report = check(file, anchor=None if anchor is None else _parsed(anchor), key=key)
    make_console().print(str(report), markup=False)
    if not report.ok:
        raise typer.Exit(EXIT_BROKEN)
    if report.lines:
        make_console().print(f"  anchor: {report.lines}:{report.hash}", markup=False)


def _parsed(anchor: str) -> tuple[int, str]:
    count, _, digest = anchor.partition(":")
    if not count.isdecimal() or len(digest) != 64:
        raise ValueError(
            f"ledger verify: --anchor: expected COUNT:HASH as `ledger verify` prints it, got "
            f"{anchor!r}"
        )
    return int(count), digest
