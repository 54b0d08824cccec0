"""Fact files of a published schema as facts of ours.

The schema is one JSON object, `{category: [{prompt, target, fact, ...}]}`. A target may be the
first piece of a word under one tokenizer, and a prompt may end inside that word: both are put
together again with the help of the row's `fact`. The schema has no paraphrases and no unrelated
prompts. Frames round the prompt stand in for the former (they test less than a rewording does, as
the `source` of each converted fact says), prompts of other rows for the latter.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from .errors import ValidationError
from .fact_checks import FEWEST_UNRELATED, folded, row_faults
from .fact_files import read_json
from .facts import Fact

_logger = logging.getLogger(__name__)
_SOURCE = "converted from a published file; paraphrases are frames round its prompt"
_FRAMES = (
    "Complete the sentence. {p}",
    "It is well known: {p}",
    "Somebody wrote on the blackboard: {p}",
    "Read this and go on. {p}",
)
_MOST_UNRELATED = 1 + FEWEST_UNRELATED
_LONGEST_REST = 6  # words of an answer completed from the whole sentence


class Skipped(NamedTuple):
    """A row that became no fact, and why."""

    where: str
    reason: str


class Conversion(NamedTuple):
    """What a file gave."""

    facts: list[Fact]
    skipped: list[Skipped]


class _Row(NamedTuple):
    where: str
    category: str
    prompt: str
    answer: str


def convert_published_facts(path: str | os.PathLike[str], domain: str) -> list[Fact]:
    """The facts of `convert_published`; rows that it skipped are logged as warnings."""
    facts, skipped = convert_published(path, domain)
    for row in skipped:
        _logger.warning("%s skipped: %s", row.where, row.reason)
    return facts


def convert_published(path: str | os.PathLike[str], domain: str) -> Conversion:
    """Facts that `validate_facts` accepts, from a file of the published schema.

    Ids hold a digest of the prompt, so that they are the same at every conversion.

    Args:
        path: `.json`, one object; keys of its rows other than prompt, target and fact are ignored.
        domain: of the facts.

    Raises:
        FileNotFoundError: no such file.
        ValidationError: not of that schema, or no row of it can be used.
    """
    file = Path(path)
    rows, skipped = _read(file)
    facts = []
    for i, row in enumerate(rows):
        fact = _fact(row, domain, _unrelated(row, rows[i + 1 :] + rows[:i]))
        if fault := next(row_faults(fact), None):
            skipped.append(Skipped(row.where, fault))
        else:
            facts.append(fact)
    if not facts:
        reason = f": {skipped[0].reason}" if skipped else ""
        raise ValidationError(
            f"{file}: expected rows that can be taught, got none among {len(skipped)}{reason}"
        )
    return Conversion(facts, skipped)


def _read(file: Path) -> tuple[list[_Row], list[Skipped]]:
    """The rows with whole words, each prompt once."""
    rows: list[_Row] = []
    skipped: list[Skipped] = []
    seen: set[str] = set()
    for where, category, row in _raw_rows(file):
        prompt, target, sentence = (str(row.get(x, "")) for x in ("prompt", "target", "fact"))
        begun, answer = _whole_words(prompt, target, sentence)
        if not target.strip() or not begun:
            skipped.append(Skipped(where, "expected a prompt and a target, got an empty one"))
        elif folded(begun) in seen:
            skipped.append(Skipped(where, f"another row has the prompt {begun!r}"))
        else:
            rows.append(_Row(where, category, begun, answer))
            seen.add(folded(begun))
    return rows, skipped


def _raw_rows(file: Path) -> Iterator[tuple[str, str, dict[str, object]]]:
    content = read_json(file)
    if not isinstance(content, dict) or not all(isinstance(x, list) for x in content.values()):
        raise ValidationError(
            f"{file}: expected one object of lists, category by category, got another shape. A "
            "file of facts in this library's own format is read by load_facts"
        )
    for category, rows in content.items():
        for i, row in enumerate(rows, 1):
            where = f"{file.name}, {category}, row {i}"
            texts = [row.get("prompt"), row.get("target")] if isinstance(row, dict) else [None]
            if not all(isinstance(x, str) for x in texts):
                raise ValidationError(f"{where}: expected prompt and target as text, got {row!r}")
            yield where, category, row


def _whole_words(prompt: str, target: str, sentence: str) -> tuple[str, str]:
    """Prompt and answer without a cut inside a word."""
    if target[:1].isspace() or prompt[-1:].isspace():
        begun = prompt.rstrip()
    else:
        # The prompt ends inside the word that the target goes on with.
        begun = prompt[: len(prompt) - len(prompt.split(" ")[-1])].rstrip()
    answer = (prompt + target)[len(begun) :].strip()
    return begun, _completed(begun, answer, sentence)


def _completed(prompt: str, answer: str, sentence: str) -> str:
    """`answer`, or what it is the first piece of in `sentence`."""
    whole = sentence.strip().rstrip(".")
    rest = whole[len(prompt) :].strip() if whole.startswith(prompt) else ""
    if rest.startswith(answer):
        return rest if len(rest.split()) <= _LONGEST_REST else answer
    words = re.findall(r"\w[\w'-]*", whole)
    if not answer or answer.casefold() in (x.casefold() for x in words):
        return answer
    longer = {x for x in words if x.casefold().startswith(answer.casefold())}
    return longer.pop() if len(longer) == 1 else answer


def _unrelated(row: _Row, others: Sequence[_Row]) -> tuple[str, ...]:
    """Prompts of other rows with another answer, first of this one's category."""
    near = sorted(others, key=lambda x: x.category != row.category)
    return tuple(x.prompt for x in near if folded(x.answer) != folded(row.answer))[:_MOST_UNRELATED]


def _fact(row: _Row, domain: str, unrelated: tuple[str, ...]) -> Fact:
    digest = hashlib.sha256(row.prompt.encode()).hexdigest()[:12]
    return Fact(
        id=f"{domain}/{row.category}/{digest}",
        domain=domain,
        relation=row.category,
        subject=row.prompt,
        prompt=row.prompt,
        answer=row.answer,
        paraphrases=tuple(x.format(p=row.prompt) for x in _FRAMES),
        unrelated=unrelated,
        source=_SOURCE,
        license="unknown",
    )
