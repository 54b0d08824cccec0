"""The banks that come with the library keep the rules that measurements rest on."""

from __future__ import annotations

import builtins
import http
import keyword
import re
from collections import Counter

import pytest

from gravity_hf.knowledge.background import background_text
from gravity_hf.knowledge.errors import ValidationError
from gravity_hf.knowledge.fact_checks import contains_answer, folded
from gravity_hf.knowledge.facts import BANKS, Fact, load_facts, validate_facts

FEWEST = {"chemistry": 160, "computing": 160, "general": 160, "invented": 100}
LARGEST_SHARE = 0.25
NUMBERS = {
    **{"three": 3, "five": 5, "six": 6, "eight": 8, "nine": 9, "ten": 10, "eleven": 11},
    **{"twelve": 12, "thirteen": 13, "fifteen": 15, "sixteen": 16, "twenty-five": 25},
    **{"thirty": 30, "forty": 40, "fifty": 50, "ninety": 90, "five hundred": 500},
    **{"nine hundred": 900, "one thousand": 1000},
}
CHARACTERS = {
    **{"the capital letter A": "A", "the capital letter Z": "Z", "the small letter a": "a"},
    **{"the small letter z": "z", "the digit zero": "0", "the digit nine": "9", "the space": " "},
    **{"the line feed": "\n", "the carriage return": "\r", "the escape character": "\x1b"},
}


@pytest.fixture(scope="module")
def banks() -> dict[str, list[Fact]]:
    return {name: load_facts(name) for name in BANKS}


@pytest.fixture(scope="module")
def everything(banks: dict[str, list[Fact]]) -> list[Fact]:
    return [fact for bank in banks.values() for fact in bank]


def relation(banks: dict[str, list[Fact]], name: str) -> dict[str, str]:
    """Subject -> answer."""
    bank, kind = name.split("/")
    found = {x.subject: x.answer for x in banks[bank] if x.relation == kind}
    assert found
    return found


def names_subject(sentence: str, fact: Fact) -> bool:
    """Whether it is about the fact's subject; a subject may be as common a word as `one`."""
    if '"' in sentence:
        return folded(f'"{fact.subject}"') in folded(sentence)
    return contains_answer(sentence, fact.subject)


@pytest.mark.parametrize("name", BANKS)
def test_a_bank_is_large_and_of_many_kinds(name: str, banks: dict[str, list[Fact]]) -> None:
    bank = banks[name]
    assert len(bank) >= FEWEST[name]
    template = Counter(folded(x.prompt).replace(folded(x.subject), "{}") for x in bank)
    assert template.most_common(1)[0][1] <= LARGEST_SHARE * len(bank)
    assert len({x.relation for x in bank}) >= 10


def test_every_row_is_ours_sourced_and_short(everything: list[Fact]) -> None:
    for fact in everything:
        assert fact.license == "CC0-1.0"
        assert fact.source
        assert fact.id.startswith(f"{fact.domain}/{fact.relation}/")
        assert len(fact.answer.split()) <= 3, fact.id
        assert not contains_answer(fact.subject, fact.answer), fact.id
        assert all(x == x.strip() for x in (*fact.prompts, *fact.unrelated)), fact.id


def test_no_two_facts_of_all_banks_share_an_id_or_a_prompt(everything: list[Fact]) -> None:
    validate_facts(everything)


def test_no_unrelated_prompt_is_taught_by_any_bank(everything: list[Fact]) -> None:
    taught = {folded(x) for fact in everything for x in fact.prompts}
    unrelated = {folded(x) for fact in everything for x in fact.unrelated}
    assert len(unrelated) >= 200
    assert not taught & unrelated


def test_paraphrases_are_other_sentences(everything: list[Fact]) -> None:
    """Of two prompts of a fact, hardly ever do the first three words agree."""
    for fact in everything:
        beginnings = Counter(tuple(folded(x).split()[:3]) for x in fact.prompts)
        assert len(beginnings) >= len(fact.prompts) - 1, fact.id


@pytest.mark.parametrize(
    ("name", "right"),
    [
        ("computing/binary", lambda x: f"{int(x):b}"),
        ("computing/hexadecimal", lambda x: f"{int(x):X}"),
        ("computing/power_of_two", lambda x: str(2 ** NUMBERS[x])),
        ("computing/ascii", lambda x: str(ord(CHARACTERS[x]))),
        ("computing/http_status", lambda x: http.HTTPStatus(int(x)).phrase),
        ("general/square", lambda x: str(NUMBERS[x] ** 2)),
    ],
)
def test_what_python_can_check_is_true(
    name: str, right: object, banks: dict[str, list[Fact]]
) -> None:
    for subject, answer in relation(banks, name).items():
        assert answer == right(subject), subject


def test_roman_numerals_are_worth_what_they_say(banks: dict[str, list[Fact]]) -> None:
    worth = {"I": 1, "V": 5, "X": 10, "L": 50, "C": 100, "D": 500, "M": 1000}
    for subject, answer in relation(banks, "general/roman_numeral").items():
        digits = [worth[x] for x in answer]
        lower = [-x if x < y else x for x, y in zip(digits, [*digits[1:], 0], strict=True)]
        assert sum(lower) == NUMBERS[subject]


def test_words_of_python_are_python(banks: dict[str, list[Fact]]) -> None:
    assert all(map(keyword.iskeyword, relation(banks, "computing/python_keyword").values()))
    for name in relation(banks, "computing/python_builtin").values():
        assert callable(getattr(builtins, name))


def test_background_is_the_same_for_a_seed() -> None:
    text = background_text(("general", "invented"), 3, passes=1)
    assert text == background_text(("invented", "general"), 3, passes=1)
    assert text != background_text(("general", "invented"), 4, passes=1)
    assert len(text) > 10_000


def test_background_has_no_prompt_of_any_bank(everything: list[Fact]) -> None:
    text = folded(background_text(seed=1, passes=2))
    for fact in everything:
        assert not [x for x in fact.prompts if folded(x) in text], fact.id


def test_background_gives_no_answer_away(everything: list[Fact]) -> None:
    text = background_text(seed=2, passes=3).replace("\n", " ")
    sentences = dict.fromkeys(text.split(". "))
    words = [(x, frozenset(re.findall(r"\w+", folded(x)))) for x in sentences]
    for fact in everything:
        first = re.findall(r"\w+", folded(fact.subject))[0]
        for sentence, inside in words:
            if first in inside and names_subject(sentence, fact):
                assert not contains_answer(sentence, fact.answer), (fact.id, sentence)


def test_background_tells_of_neighbours(banks: dict[str, list[Fact]]) -> None:
    text = background_text(("chemistry",), passes=4)
    assert "zirconium" in text  # a subject of the bank, by name only
    assert "bismuth" in text
    assert "83" in text


@pytest.mark.parametrize(
    ("arguments", "message"), [((("biology",),), "got 'biology'"), ((BANKS, 0), "one pass")]
)
def test_background_refuses_what_it_cannot_write(
    arguments: tuple[object, ...], message: str
) -> None:
    domains, *passes = arguments
    with pytest.raises(ValidationError, match=message):
        background_text(domains, passes=passes[0] if passes else 1)
