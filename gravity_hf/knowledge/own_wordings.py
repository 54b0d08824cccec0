"""More texts to train a delta on than a fact brings: other wordings, and neighbours of its own.

A delta that sees its answer in one or two wordings learns a sentence. What stands before the
subject (Meng et al. 2022 put random text there), what follows it, and the form of a question are
varied here, by sentences that suit any fact. Neighbours are the other side of it: the same wording
about another subject, and the same subject in sentences that ask for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from .facts import Fact

__all__ = ["own_neighbours", "own_wordings"]

_BEFORE = (
    "The garden looks empty in winter.",
    "She closed the book and looked out of the window.",
    "It had rained for three days.",
    "Please read the next line with care.",
)
_WITH_RELATION = (
    "Question: what is the {relation} of {subject}? Answer:",
    "{subject}: {relation}:",
)
_AFTER = ("{prompt}, as everybody knows,", "{prompt}, in short,")
_SUBJECTS = ("Mozart", "the moon", "Japan", "a window", "iron", "Napoleon", "tea", "Paris")
_ABOUT = (
    "{subject} and",
    "When people hear of {subject}, they think of",
    "Yesterday I read about {subject} and",
    "I like {subject}, because",
)


def own_wordings(fact: Fact, prompts: list[str], count: int) -> list[str]:
    """At most `count` more texts that the fact's answer completes, none of which has it in itself
    or is one of the fact's own prompts: what is held out stays held out.

    Args:
        prompts: those that are trained on anyway, the first of them the fact's own.
    """
    named = bool(fact.subject.strip() and fact.relation.strip())
    values = {
        "prompt": fact.prompt,
        "subject": fact.subject,
        "relation": fact.relation.replace("_", " "),
    }
    forms: list[Iterator[str]] = [
        (f"{text} {prompts[i % len(prompts)]}" for i, text in enumerate(_BEFORE)),
        (_filled(text, values) for text in (_WITH_RELATION if named else ())),
        (_filled(text, values) for text in _AFTER),
    ]
    answers = re.compile("|".join(map(_whole, fact.answers)))
    silent = [(text for text in form if not answers.search(text)) for form in forms]
    return _in_turn(silent, set(fact.prompts), count)


def own_neighbours(fact: Fact, prompts: list[str], count: int) -> list[str]:
    """At most `count` more texts that the fact's delta must not change, none of which is one of the
    fact's own; none without a subject."""
    if not fact.subject.strip():
        return []
    subject = re.compile(_whole(fact.subject))
    others = [name for name in _SUBJECTS if name.lower() not in fact.subject.lower()]
    about_others = (subject.sub(name, prompts[i % len(prompts)]) for i, name in enumerate(others))
    forms = [about_others, (_filled(text, {"subject": fact.subject}) for text in _ABOUT)]
    return _in_turn(forms, {*fact.prompts, *fact.unrelated}, count)


def _whole(text: str) -> str:
    """A pattern for `text` where it is no part of a longer word."""
    return rf"(?<!\w){re.escape(text)}(?!\w)"


def _filled(text: str, values: dict[str, str]) -> str:
    # In one pass: a subject may have braces.
    return re.sub(r"{(\w+)}", lambda found: values[found[1]], text)


def _in_turn(forms: list[Iterator[str]], known: set[str], count: int) -> list[str]:
    """The first `count` new texts, of each form one after the other."""
    found: list[str] = []
    while forms and len(found) < count:
        for form in list(forms):
            text = next(form, None)
            if text is None:
                forms.remove(form)
            elif text not in known and len(found) < count:
                known.add(text)
                found.append(text)
    return found
