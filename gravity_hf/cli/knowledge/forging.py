"""`gravity-hf forge`: facts into deltas of several facts each, kept apart from all others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from ..console import make_console
from .arguments import Bank, Device, Dtype, Limit, ModelDir, Relations, StoreDir
from .opening import chosen_facts, open_store
from .tables import measure, show_table

if TYPE_CHECKING:
    from ...knowledge.forge import ForgeResult


def forge(
    directory: ModelDir,
    beliefs: StoreDir,
    bank: Bank,
    domain: Annotated[
        str | None, typer.Option(help="Of the beliefs' keys; the facts' by default.")
    ] = None,
    relations: Relations = None,
    limit: Limit = None,
    rank: Annotated[
        str, typer.Option(help="A number, or search for the smallest that passes.")
    ] = "4",
    facts_per_delta: Annotated[int, typer.Option("--per-delta", min=1, help="Facts in one.")] = 10,
    orthogonality: Annotated[str, typer.Option(help="projected, penalty or check.")] = "projected",
    min_top1: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of facts and paraphrases to be right.")
    ] = 0.8,
    max_kl: Annotated[float, typer.Option(min=0.0, help="Nats at unrelated prompts.")] = 0.05,
    text: Annotated[
        list[Path] | None,
        typer.Option(help="File of running text that must stay as it is; may be given again."),
    ] = None,
    results: Annotated[Path | None, typer.Option(help="Write everything here, as JSON.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Make FACTS into deltas of --per-delta facts each, and keep those that pass.

    A delta counts once its facts are answered in other words too, its neighbours stayed, and it
    shares no directions with others in KB. What fails is named with its reason. KB must be there:
    gravity-hf beliefs create DIR KB

    Example:

        gravity-hf forge model kb chemistry --relation symbol --rank search --text book.txt
    """
    from ...knowledge.encoding_config import EncodingConfig
    from ...knowledge.forge import Forge, Validation
    from ...knowledge.registry import Registry
    from ...knowledge.store_changes import read_manifest

    facts = chosen_facts(bank, relations, limit)
    texts = [_text_of(file) for file in text or ()]
    store = open_store(directory, beliefs, device, dtype)
    made = Forge(
        store.model,
        store.tokenizer,
        Registry(store),
        rank=_parsed_rank(rank),
        facts_per_delta=facts_per_delta,
        encoding=EncodingConfig.from_dict(read_manifest(store.path).encoder or {}),
        orthogonality=orthogonality,
        validation=Validation(min_top1=min_top1, max_kl=max_kl),
    ).run(facts, domain or facts[0].domain, unrelated_text=texts or None)
    _show(make_console(), made, len(facts))
    if results is not None:
        results.write_text(json.dumps(made.to_dict(), indent=1) + "\n", encoding="utf-8")


def _parsed_rank(rank: str) -> int | str:
    if rank == "search":
        return rank
    if not rank.isdecimal() or int(rank) < 1:
        raise ValueError(f"--rank: expected a number of at least 1, or search, got {rank!r}")
    return int(rank)


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text: expected a file of text in UTF-8, got {str(file)!r}") from error


def _show(console: Console, made: ForgeResult, count: int) -> None:
    if made.deltas:
        rows = [
            (
                forged.key,
                len(forged.facts),
                forged.attempt.rank,
                len(forged.attempt.layers),
                *(measure(forged.metrics, x) for x in ("top1", "paraphrase_top1", "kl_unrelated")),
            )
            for forged in made.deltas
        ]
        titles = ("key", "facts", "rank", "layers", "right", "paraphrases", "KL elsewhere")
        show_table(console, titles, rows, numbers=6)
    for own, reason, _ in made.rejected:
        shown = ", ".join(fact.id for fact in own[:3]) + (" ..." if len(own) > 3 else "")
        console.print(f"rejected {len(own)} facts ({shown}): {reason}", markup=False)
    console.print(
        f"{len(made.facts)} of {count} facts in {len(made.deltas)} deltas, {made.seconds:.0f} s",
        markup=False,
    )
