"""Prose about the world of the banks, for training a base that does not know their facts yet.

A base that never saw the words of a bank cannot be asked whether a delta left its neighbours
alone: it has no answer to leave alone. This text tells it about other subjects of the same
relations, those that the banks' unrelated prompts ask for, in sentences that occur in no bank. Of
the banks' own subjects it has the names, without what is said of them.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from .errors import ValidationError
from .facts import BANKS, load_facts

_FILE = Path(__file__).parent / "banks" / "background.jsonl"
_MENTIONS = (
    "The index lists {s} under {r}.",
    "One page of the lexicon has the heading {s}.",
    "A reader wished to know more about {s}, and looked for the part on {r}.",
    "Of {s} the next volume will tell.",
    "There is a drawer for {r}, and in it a card for {s}.",
)
_SHORTEST, _LONGEST = 3, 7  # sentences of a paragraph


def background_text(domains: Sequence[str] = BANKS, seed: int = 0, *, passes: int = 4) -> str:
    """Paragraphs of plain sentences, the same for the same arguments.

    No prompt or paraphrase of any bank is in it, and no sentence has both the subject and the
    answer of one of their facts.

    Args:
        domains: names in `facts.BANKS`.
        seed: of the order and of the choice among sentences.
        passes: how often every subject comes up, each time in another order.

    Returns:
        About 100 KiB for each pass over all four domains; paragraphs have an empty line between
        them.

    Raises:
        ValidationError: a domain that is not a bank, or fewer than one pass.
    """
    if unknown := sorted(set(domains) - set(BANKS)):
        raise ValidationError(
            f"background_text: expected domains among {', '.join(BANKS)}, got {unknown[0]!r}"
        )
    if passes < 1:
        raise ValidationError(f"background_text: expected at least one pass, got {passes!r}")
    generator = random.Random(seed)
    topics = [topic for domain in sorted(set(domains)) for topic in _topics(domain)]
    paragraphs = [x for _ in range(passes) for x in _one_pass(topics, generator)]
    return "\n\n".join(paragraphs) + "\n"


def _topics(domain: str) -> list[list[tuple[str, ...]]]:
    """For each relation of a bank its subjects, each as the sentences that can be said of it."""
    mentioned: dict[str, list[tuple[str, ...]]] = {}
    for fact in load_facts(domain):
        words = {"s": f'"{fact.subject}"', "r": fact.relation.replace("_", " ")}
        mentioned.setdefault(fact.relation, []).append(_filled(_MENTIONS, words))
    told = {row["relation"]: _told(row) for row in _world() if row["domain"] == domain}
    return [subjects + told.get(name, []) for name, subjects in sorted(mentioned.items())]


def _world() -> list[dict[str, Any]]:
    return [json.loads(line) for line in _FILE.read_text(encoding="utf-8").splitlines()]


def _told(row: dict[str, Any]) -> list[tuple[str, ...]]:
    return [
        _filled(row["sentences"], {"s": s, "a": a, "S": _capital(s), "A": _capital(a)})
        for s, a in row["pairs"]
    ]


def _filled(templates: Sequence[str], words: dict[str, str]) -> tuple[str, ...]:
    return tuple(template.format_map(words) for template in templates)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _one_pass(topics: Sequence[list[tuple[str, ...]]], generator: random.Random) -> Iterator[str]:
    """Every subject once; a paragraph stays with one relation, relations come in any order."""
    paragraphs = []
    for topic in topics:
        sentences = [generator.choice(told) for told in topic]
        generator.shuffle(sentences)
        while sentences:
            length = generator.randint(_SHORTEST, _LONGEST)
            paragraphs.append(" ".join(sentences[:length]))
            sentences = sentences[length:]
    generator.shuffle(paragraphs)
    yield from paragraphs
