"""`gravity-hf beliefs create | add | add-bank | update`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import make_console
from .arguments import (
    Aliases,
    Bank,
    Device,
    Dtype,
    Key,
    Limit,
    ModelDir,
    NewKey,
    Relations,
    Source,
    StoreDir,
)
from .opening import chosen_facts, forget_strangers, open_base, open_store
from .tables import show_encoded

if TYPE_CHECKING:
    from ...knowledge.facts import Fact


def create(
    directory: ModelDir,
    beliefs: StoreDir,
    rank: Annotated[int | None, typer.Option(min=1, help="Of each update.")] = None,
    layers: Annotated[str | None, typer.Option(help="third, middle, all or numbers: 3,4,5")] = None,
    targets: Annotated[
        list[str] | None, typer.Option("--target", help="Last part of a map's name.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Of training, at most.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Of Adam.")] = None,
    own_wordings: Annotated[
        int | None, typer.Option(min=0, help="More wordings to train on. Default: 8")
    ] = None,
    own_neighbours: Annotated[
        int | None, typer.Option(min=0, help="More prompts that must not change. Default: 12")
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the first factors.")] = None,
    budget: Annotated[
        float | None,
        typer.Option(help="Share of the model's parameters that a fact may cost. Default: 2e-4"),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Make KB, an empty store of beliefs for the model in DIR, and pin that model by its digest.

    The options say how facts will be encoded there; without them the library's settings are used.

    Example:

        gravity-hf beliefs create model kb
    """
    from ...knowledge.encoding_config import EncodingConfig
    from ...knowledge.store import BeliefStore

    given = {
        "rank": rank,
        "layers": None if layers is None else _parsed_layers(layers),
        "targets": tuple(targets) if targets else None,
        "steps": steps,
        "learning_rate": learning_rate,
        "own_wordings": own_wordings,
        "own_neighbours": own_neighbours,
        "seed": seed,
        "budget_fraction": budget,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    config = EncodingConfig().with_changes(**changes)
    model, tokenizer = open_base(directory, device, dtype)
    store = BeliefStore.create(beliefs, model, tokenizer, config)
    console = make_console()
    console.print(f"made {beliefs}", markup=False)
    console.print(f"  base {store.base_digest.root}", markup=False)


def _parsed_layers(text: str) -> str | tuple[int, ...]:
    if text in ("third", "middle", "all"):
        return text
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise ValueError(
            f"--layers: expected third, middle, all or numbers such as 3,4,5, got {text!r}"
        )
    return tuple(int(part) for part in parts)


def add(
    directory: ModelDir,
    beliefs: StoreDir,
    prompt: Annotated[str, typer.Argument(help="Text that ANSWER completes.", show_default=False)],
    answer: Annotated[str, typer.Argument(help="A few words.", show_default=False)],
    key: NewKey = None,
    aliases: Aliases = None,
    paraphrases: Annotated[
        list[str] | None, typer.Option("--paraphrase", help="Another prompt for the same answer.")
    ] = None,
    unrelated: Annotated[
        list[str] | None, typer.Option("--unrelated", help="A prompt that must stay as it is.")
    ] = None,
    source: Source = "",
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Teach the model in DIR one fact, as a belief in KB. The model itself stays as it is.

    Paraphrases and unrelated prompts are worth giving: without them nobody can measure whether
    the fact is known in other words and whether its neighbours stayed.

    Example:

        gravity-hf beliefs add model kb "The capital of Varnholt is" Ostrenna --key geo/varnholt
    """
    store = open_store(directory, beliefs, device, dtype)
    belief = store.add(
        prompt,
        answer,
        key=key,
        aliases=tuple(aliases or ()),
        paraphrases=tuple(paraphrases or ()),
        unrelated=tuple(unrelated or ()),
        source=source,
        progress=True,
    )
    show_encoded(make_console(), [belief])


def add_bank(
    directory: ModelDir,
    beliefs: StoreDir,
    bank: Bank,
    relations: Relations = None,
    limit: Limit = None,
    only_unknown: Annotated[
        bool, typer.Option("--only-unknown", help="Leave out what the model answers already.")
    ] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Teach all FACTS, each as a belief of its own: all of them, or none where something fails.

    Facts whose key KB has already are left out.

    Example:

        gravity-hf beliefs add-bank model kb invented --relation capital
    """
    facts = chosen_facts(bank, relations, limit)
    store = open_store(directory, beliefs, device, dtype)
    console = make_console()
    new = [fact for fact in facts if fact.id not in store]
    _say_left_out(console, len(facts) - len(new), "there already")
    if only_unknown and new:
        unknown = _unknown(store, new)
        _say_left_out(console, len(new) - len(unknown), "known to the model")
        new = unknown
    if not new:
        console.print("nothing to add")
        return
    show_encoded(console, store.add_many(new))


def _say_left_out(console: Any, count: int, reason: str) -> None:
    if count:
        console.print(f"  {count} facts left out: {reason}", markup=False)


def _unknown(store: Any, facts: list[Fact]) -> list[Fact]:
    """Those that greedy decoding of the base alone does not answer."""
    from ...knowledge.fact_metrics import evaluate_facts

    measured = evaluate_facts(store.model, store.tokenizer, facts)
    return [fact for fact, own in zip(facts, measured, strict=True) if not own["exact"]]


def update(
    directory: ModelDir,
    beliefs: StoreDir,
    key: Key,
    answer: Annotated[str, typer.Argument(help="The new answer.", show_default=False)],
    aliases: Aliases = None,
    source: Annotated[str | None, typer.Option(help="Where the new answer is from.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Give KEY another answer, as its next version; earlier ones stay for rollback.

    Example:

        gravity-hf beliefs update model kb geo/varnholt Tavisk
    """
    store = open_store(directory, beliefs, device, dtype)
    belief = store.update(key, answer, source=source, aliases=tuple(aliases or ()), progress=True)
    forget_strangers(store)
    show_encoded(make_console(), [belief])
    make_console().print(f"  {key} is at version {belief.version}", markup=False)
