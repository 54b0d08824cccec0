"""Prompts that need a stored fact, prompts that need reasoning, and prompts that need both.

Each is the beginning of a sentence that ends where its answer begins, so that base models without
instruction tuning can be asked too, and each answer can be checked by its first words.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

from .errors import ValidationError
from .facts import Fact

RETRIEVAL, REASONING, BOTH = "retrieval", "reasoning", "both"
CATEGORIES = (RETRIEVAL, REASONING, BOTH)


@dataclass(frozen=True)
class SeparationPrompt:
    """One query.

    Args:
        text: what is asked.
        category: one of `CATEGORIES`.
        answers: beginnings of a right continuation; case does not count.
        fact: whose fact it needs; None where it needs none.
        kind: of prompt within its category, `"arithmetic"`.
    """

    text: str
    category: str
    answers: tuple[str, ...]
    fact: Fact | None = field(default=None, repr=False)
    kind: str = ""


# Nothing here has to be known beyond what the sentence itself says, small numbers, the alphabet and
# the days of the week. Answers that count as well stand behind a bar.
_REASONING: dict[str, tuple[tuple[str, str], ...]] = {
    "arithmetic": (
        ("Two plus three equals", "five|5"),
        ("Seven minus four leaves", "three|3"),
        ("Six times two makes", "twelve|12"),
        ("Half of eighteen is", "nine|9"),
        ("Ten divided by five is", "two|2"),
        ("Sam had 8 pears and ate 3 of them, so the number of pears left is", "5|five"),
        ("A box holds 4 cups. Three such boxes hold a number of cups equal to", "12|twelve"),
        ("Starting from 15 and adding 10 gives", "25|twenty-five|twenty five"),
    ),
    "sequence": (
        ("The next number after 3, 6, 9, 12 is", "15|fifteen"),
        ("Counting down: 20, 18, 16, 14,", "12|twelve"),
        ("Doubling each time: 1, 2, 4, 8,", "16|sixteen"),
        ("Every second letter: A, C, E, G,", "I"),
        ("In order: Monday, Tuesday, Wednesday,", "Thursday"),
        ("The pattern goes red, blue, red, blue, red,", "blue"),
        ("The pattern goes up, up, down, up, up, down, up, up,", "down"),
        ("Z, Y, X, W,", "V"),
    ),
    "syllogism": (
        ("Every blick is a snarp. Olo is a blick. Therefore Olo is a", "snarp"),
        ("All mips are green. This thing is a mip. So its colour is", "green"),
        ("No wug can swim. Pia is a wug. Can Pia swim? The answer is", "no"),
        ("If the bell rings, the door opens. The bell rings. So the door", "opens|will open"),
        ("The key is in the drawer or in the bag. It is not in the drawer. So it is in the", "bag"),
        ("Every tolan has two horns. Rik is a tolan, so the number of horns on Rik is", "two|2"),
    ),
    "comparison": (
        ("Tom is taller than Ann, and Ann is taller than Bo. The tallest of the three is", "Tom"),
        ("Tom is taller than Ann, and Ann is taller than Bo. The shortest of the three is", "Bo"),
        ("The red bag is heavier than the blue bag. The lighter bag is the", "blue"),
        ("Of the numbers 14, 3 and 27, the largest is", "27|twenty-seven"),
        ("Of the numbers 14, 3 and 27, the smallest is", "3|three"),
        ("Eva came before Max, and Max came before Lou. The last one to come was", "Lou"),
    ),
    "text": (
        ("The last word of the sentence 'the small dog ran home' is", "home"),
        ("The first letter of the word 'window' is", "w"),
        ("The number of words in the phrase 'green tea leaf' is", "three|3"),
        ("Say the word lantern again: lantern,", "lantern"),
        ("Without its first letter, the word 'stone' is", "tone"),
        ("Put side by side, the words 'sun' and 'flower' make the single word", "sunflower"),
    ),
    "substitution": (
        ("Let x be 4. Then x plus 1 is", "5|five"),
        ("In this code cat means sun. So in this code, the word for sun is", "cat"),
        ("Ida put the coin in the jar, and nobody moved it. The coin is in the", "jar"),
        ("Leo gave his hat to Mia. The hat is now with", "Mia"),
        ("Facing north and turning all the way around once, one faces", "north"),
        ("The cup is on the table, and the table is in the hall. So the cup is in the", "hall"),
    ),
}


def reasoning_prompts() -> list[SeparationPrompt]:
    """Forty prompts that no stored fact helps with."""
    return [
        SeparationPrompt(text, REASONING, tuple(answers.split("|")), kind=kind)
        for kind, prompts in _REASONING.items()
        for text, answers in prompts
    ]


def separation_prompts(
    facts: Sequence[Fact], *, trained: Sequence[str] = (), seed: int = 0
) -> list[SeparationPrompt]:
    """For each fact one prompt for retrieval and two that need reasoning on it, then all that need
    reasoning alone: 40 + 3 n.

    Args:
        facts: at least two, with different answers.
        trained: prompts not to ask, because deltas were trained on them.
        seed: of what is offered beside the right answer, and in which order.

    Raises:
        ValidationError: fewer than two answers, or a fact all of whose paraphrases were trained on.
    """
    if len({fact.answer for fact in facts}) < 2:
        raise ValidationError(
            f"separation_prompts: expected facts with at least two answers, got {len(facts)} facts"
        )
    rng, found, seen = random.Random(seed), [], set(trained)
    for fact in facts:
        unseen = [text for text in fact.paraphrases if text not in seen]
        if not unseen:
            raise ValidationError(
                f"separation_prompts: {fact.id}: expected a paraphrase that was not trained on, "
                "got none. Train on fewer"
            )
        asked = unseen[-1]
        found.append(SeparationPrompt(asked, RETRIEVAL, fact.answers, fact, "paraphrase"))
        found.append(_first_letter(fact))
        found.append(_choice(fact, facts, rng))
    return found + reasoning_prompts()


def _first_letter(fact: Fact) -> SeparationPrompt:
    letters = tuple(dict.fromkeys(answer[0] for answer in fact.answers))
    text = f'Someone reads aloud "{fact.prompt} ..." The words left out begin with the letter'
    return SeparationPrompt(text, BOTH, letters, fact, "letter")


def _choice(fact: Fact, facts: Sequence[Fact], rng: random.Random) -> SeparationPrompt:
    """Between the answer and another fact's, of the same relation where there is one."""
    others = [x for x in facts if x.answer not in fact.answers and fact.answer not in x.answers]
    alike = [x for x in others if (x.domain, x.relation) == (fact.domain, fact.relation)]
    pair = [fact.answer, rng.choice(alike or others).answer]
    rng.shuffle(pair)
    text = f'To end the sentence "{fact.prompt} ...", out of {pair[0]} and {pair[1]} one takes'
    return SeparationPrompt(text, BOTH, fact.answers, fact, "choice")


def is_right(text: str, prompt: SeparationPrompt) -> bool:
    """Whether a continuation begins with one of the answers, as whole words. Case does not count,
    nor do quotation marks and spaces before it."""
    begun = text.lstrip(" \t\n\"'“‘(").casefold()
    for answer in prompt.answers:
        wanted = answer.casefold()
        if begun.startswith(wanted) and not begun[len(wanted) : len(wanted) + 1].isalnum():
            return True
    return False
