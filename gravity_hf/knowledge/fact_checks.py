"""What makes a fact, or a set of facts, unfit for teaching and measuring."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .facts import Fact

FEWEST_PARAPHRASES = 3
FEWEST_UNRELATED = 2
LONGEST_TEXT = 2000  # characters; a prompt is a sentence, not a document


def folded(text: str) -> str:
    """`text` without what does not make another prompt: case and runs of spaces."""
    return " ".join(text.split()).casefold()


def contains_answer(prompt: str, answer: str) -> bool:
    """Whether `answer` stands in `prompt` as whole words, whatever the case."""
    # Not \\b: an answer may begin or end with a sign, as in "C++".
    pattern = rf"(?<!\w){re.escape(folded(answer))}(?!\w)"
    return re.search(pattern, folded(prompt)) is not None


def row_faults(fact: Fact) -> Iterator[str]:
    """What is wrong with one fact by itself."""
    for name in ("id", "domain", "relation", "subject", "prompt", "answer"):
        if not getattr(fact, name).strip():
            yield f"expected text as {name!r}, got {getattr(fact, name)!r}"
    for text in (*fact.prompts, *fact.answers, *fact.unrelated):
        yield from _text_faults(text)
    for answer in fact.answers:
        if answer != answer.strip():
            yield f"expected an answer without spaces around it, got {answer!r}"
    if len(set(fact.answers)) < len(fact.answers):
        yield f"expected answers that differ, got {fact.answers!r}"
    if len(fact.paraphrases) < FEWEST_PARAPHRASES:
        yield (
            f"expected at least {FEWEST_PARAPHRASES} paraphrases, got {len(fact.paraphrases)}: "
            "some are taught, the others test"
        )
    if len(fact.unrelated) < FEWEST_UNRELATED:
        yield f"expected at least {FEWEST_UNRELATED} unrelated prompts, got {len(fact.unrelated)}"
    yield from _prompt_faults(fact)


def _text_faults(text: str) -> Iterator[str]:
    if not text.strip():
        yield f"expected no empty text, got {text!r}"
    if len(text) > LONGEST_TEXT:
        yield f"expected at most {LONGEST_TEXT} characters, got {len(text)}: {text[:40]!r}..."
    if "\0" in text or any("\ud800" <= x <= "\udfff" for x in text):
        yield f"expected text that UTF-8 can hold, without NUL, got {text!r}"


def _prompt_faults(fact: Fact) -> Iterator[str]:
    seen: set[str] = set()
    for prompt in fact.prompts:
        if folded(prompt) in seen:
            yield f"expected paraphrases that differ, got {prompt!r} twice"
        seen.add(folded(prompt))
        for answer in fact.answers:
            if answer.strip() and contains_answer(prompt, answer):
                yield f"expected a prompt without its answer {answer!r}, got {prompt!r}"
    unrelated = [folded(x) for x in fact.unrelated]
    if len(set(unrelated)) < len(unrelated):
        yield "expected unrelated prompts that differ, got one twice"
    for prompt in fact.unrelated:
        if folded(prompt) in seen:
            yield f"expected an unrelated prompt, got one of its own: {prompt!r}"


def set_faults(facts: Sequence[Fact]) -> Iterator[str]:
    """What is wrong between facts: doubles, and answers that must both change and stay."""
    ids: set[str] = set()
    owners: dict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        if fact.id in ids:
            yield f"{fact.id}: expected an id of its own, got one that another fact has"
        ids.add(fact.id)
        for prompt in {folded(x) for x in fact.prompts}:
            owners[prompt].append(fact)
    for prompt, those in owners.items():
        for double in those[1:]:
            yield f"{double.id}: expected prompts of its own, got {prompt!r} of {those[0].id}"
    for fact in facts:
        answers = {folded(x) for x in fact.answers}
        for prompt in fact.unrelated:
            for owner in owners.get(folded(prompt), ()):
                if not answers.isdisjoint(folded(x) for x in owner.answers):
                    yield (
                        f"{fact.id}: expected an unrelated prompt with another answer, got "
                        f"{prompt!r} of {owner.id}"
                    )
