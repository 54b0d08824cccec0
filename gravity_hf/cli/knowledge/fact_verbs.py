"""`gravity-hf facts`: banks and files of facts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import make_console
from ..hosts import load_tokenizer
from .arguments import Bank
from .tables import show_table

if TYPE_CHECKING:
    from ...knowledge.facts import Fact

facts = typer.Typer(
    help="Look after files of facts.", no_args_is_help=True, rich_markup_mode="rich"
)
_SHOWN = 20


@facts.command(name="list")
def list_banks() -> None:
    """List the banks that come with the library.

    Example:

        gravity-hf facts list
    """
    from ...knowledge.facts import BANKS, load_facts

    found = {name: load_facts(name) for name in BANKS}
    rows = [
        (name, ", ".join(sorted({x.relation for x in own})), len(own))
        for name, own in found.items()
    ]
    show_table(make_console(), ("bank", "relations", "facts"), rows, numbers=1)


@facts.command()
def check(
    bank: Bank,
    model: Annotated[
        Path | None, typer.Option(help="Folder of a model: can its tokenizer write the answers?")
    ] = None,
) -> None:
    """Check that FACTS can be taught and measured; every fault is named.

    Example:

        gravity-hf facts check my_facts.jsonl --model model
    """
    from ...knowledge.facts import load_facts

    found = load_facts(bank)
    console = make_console()
    relations = Counter(fact.relation for fact in found)
    console.print(f"{len(found)} facts of {len(relations)} relations: no faults", markup=False)
    if model is not None:
        tokenizer = load_tokenizer(str(model))
        lengths = _answer_lengths(tokenizer, found)
        shares = ", ".join(f"{n}: {lengths[n]}" for n in sorted(lengths))
        console.print(f"  answers by their number of tokens: {shares}", markup=False)


def _answer_lengths(tokenizer: Any, found: list[Fact]) -> Counter[int]:
    """How many answers have 1, 2, ... tokens; a ValidationError names those that cannot be
    written."""
    from ...knowledge.errors import ValidationError
    from ...knowledge.fact_tokens import answer_ids

    lengths: Counter[int] = Counter()
    faults = []
    for fact in found:
        try:
            lengths[len(answer_ids(tokenizer, fact.prompt, fact.answer))] += 1
            for prompt in fact.paraphrases:
                answer_ids(tokenizer, prompt, fact.answer)
        except ValidationError as error:
            faults.append(f"{fact.id}: {error}")
    if faults:
        raise ValidationError(f"{len(faults)} facts cannot be taught. " + " ".join(faults[:_SHOWN]))
    return lengths


@facts.command()
def convert(
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="JSON of a published bank.", show_default=False)
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A .jsonl file.", show_default=False)],
    domain: Annotated[str, typer.Option(help="Of the facts; part of their ids.")],
) -> None:
    """Write the facts of a published bank ({category: [{prompt, target, fact}]}) to OUT.

    Words cut in pieces are put together. Paraphrases are frames round each prompt, which test less
    than other wordings would: write your own where it matters. What cannot be used is named.

    Example:

        gravity-hf facts convert published.json mine.jsonl --domain chemistry
    """
    from ...knowledge.fact_conversion import convert_published
    from ...knowledge.facts import write_facts

    if not file.is_file():
        raise ValueError(f"FILE: expected a file of JSON, got {str(file)!r}: there is none")
    if out.exists():
        raise ValueError(f"OUT: expected a new file, got {str(out)!r}, which is there")
    found, skipped = convert_published(file, domain)
    write_facts(found, out)
    console = make_console()
    for row in skipped[:_SHOWN]:
        console.print(f"  skipped {row.where}: {row.reason}", markup=False)
    console.print(f"wrote {len(found)} facts to {out}, skipped {len(skipped)}", markup=False)
