"""Small stores for tests of routing and provenance: real ones, with random deltas."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gravity_hf.knowledge.facts import Fact
from gravity_hf.knowledge.store import BeliefStore

UNKNOWN = [
    "Once upon a time there was a king who",
    "Please write a letter to my neighbour",
    "The weather tomorrow will be",
    "How do I cook rice?",
    "My favourite film is",
    "They walked along the river until",
]


def fact(name: str, prompt: str, *paraphrases: str, answer: str = "yes") -> Fact:
    domain, relation, subject = name.split("/")
    return Fact(name, domain, relation, subject, prompt, answer, (), paraphrases)


FACTS = [
    fact(
        "geo/capital/france",
        "The capital of France is",
        "France is governed from the city of",
        "France has its government in the city of",
        "Name the capital of France:",
    ),
    fact(
        "geo/capital/spain",
        "The capital of Spain is",
        "Spain is governed from the city of",
        "Spain has its government in the city of",
        "Name the capital of Spain:",
    ),
    fact(
        "chemistry/symbol/gold",
        "The symbol of gold is",
        "Chemists abbreviate gold as",
        "In formulas gold is written",
        "A label for gold reads",
    ),
    fact(
        "chemistry/symbol/iron",
        "The symbol of iron is",
        "Chemists abbreviate iron as",
        "In formulas iron is written",
        "A label for iron reads",
    ),
    fact(
        "computing/bits/byte",
        "The number of bits in a byte is",
        "A byte consists of so many bits:",
        "Bits in one byte:",
        "Count the bits of a byte:",
    ),
]

# Not indexed: the third and fourth prompt of each fact.
HELD_OUT = [(text, x.id) for x in FACTS for text in x.paraphrases[1:]]


def make_store(
    path: Path,
    model: Any,
    tokenizer: Any,
    random_delta: Callable[..., Any],
    facts: Sequence[Fact] = FACTS,
    scale: float = 0.3,
    report: dict[str, Any] | None = None,
) -> BeliefStore:
    """Every fact with a random delta of its own; keys are the facts' ids."""
    store = BeliefStore.create(path, model, tokenizer)
    with store.transaction():
        for seed, one in enumerate(facts):
            delta = random_delta(model, seed, scale=scale)
            store.add_delta(one.id, delta, fact=one, report=report)
    return store
