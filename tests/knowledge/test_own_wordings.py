"""Wordings and neighbours that the encoder makes for a fact."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gravity_hf.knowledge.encoding_config import EncodingConfig
from gravity_hf.knowledge.encoding_rows import (
    answered_prompts,
    training_prompts,
    training_rows,
)
from gravity_hf.knowledge.errors import ValidationError
from gravity_hf.knowledge.facts import BANKS, Fact, load_facts
from gravity_hf.knowledge.own_wordings import own_neighbours, own_wordings

MANY = 99


def gold(**changes: Any) -> Fact:
    fact = next(x for x in load_facts("chemistry") if x.id == "chemistry/symbol/gold")
    return replace(fact, **changes)


def test_wordings_keep_the_subject_and_vary_what_stands_around_it() -> None:
    fact = gold()
    made = own_wordings(fact, [fact.prompt], MANY)
    assert len(made) == len(set(made)) >= 6 and all("gold" in text for text in made)
    assert "Question: what is the symbol of gold? Answer:" in made
    before = [text for text in made if text.endswith(fact.prompt)]
    after = [text for text in made if text.startswith(fact.prompt)]
    assert len(before) >= 2 and len(after) >= 2
    # The first few are of all kinds.
    assert own_wordings(fact, [fact.prompt], 3) == made[:3]
    assert len({text in before for text in made[:3]}) == 2
    assert own_wordings(fact, [fact.prompt], 0) == []


def test_neighbours_are_other_subjects_and_other_sentences_about_the_same() -> None:
    fact = gold()
    made = own_neighbours(fact, [fact.prompt], MANY)
    others = [text for text in made if "gold" not in text]
    assert "The chemical symbol of Mozart is" in others
    assert len(others) >= 4 and len(made) - len(others) >= 4
    assert not any(text.startswith(fact.prompt) for text in made)
    iron = gold(subject="iron ore", prompt="The symbol of iron ore is")
    assert "The symbol of iron is" not in own_neighbours(iron, [iron.prompt], MANY)
    # A subject may be part of other words.
    letter = gold(subject="W", prompt="Which element is W? It is")
    assert "Which element is Mozart? It is" in own_neighbours(letter, [letter.prompt], MANY)


@pytest.mark.parametrize("bank", BANKS)
def test_nothing_that_is_held_out_is_made(bank: str) -> None:
    for fact in load_facts(bank):
        prompts = [fact.prompt, fact.paraphrases[0]]
        wordings = own_wordings(fact, prompts, MANY)
        assert len(wordings) >= 4 and set(wordings).isdisjoint(fact.prompts)
        neighbours = own_neighbours(fact, prompts, MANY)
        assert set(neighbours).isdisjoint({*fact.prompts, *fact.unrelated})


def test_no_wording_tells_the_answer_or_needs_what_a_fact_has_not() -> None:
    assert not any("three" in x for x in own_wordings(gold(answer="three"), ["a"], MANY))
    bare = gold(subject="", relation="")
    made = own_wordings(bare, [bare.prompt], MANY)
    assert made and not any("Question" in text or ": :" in text for text in made)
    assert own_neighbours(bare, [bare.prompt], MANY) == []
    braces = gold(subject="{x}", prompt="The {x} of {0} is")
    assert "Question: what is the symbol of {x}? Answer:" in own_wordings(braces, ["a"], MANY)


def test_they_are_trained_on_where_the_settings_say_so(tokenizer: Any) -> None:
    fact = gold()
    plain = EncodingConfig(own_wordings=0, own_neighbours=0)
    more = EncodingConfig(own_wordings=3, own_neighbours=2)
    assert answered_prompts(fact, plain) == training_prompts(fact, more)
    rows = training_rows(tokenizer, fact, more)
    known = {row.prompt for row in training_rows(tokenizer, fact, plain)}
    new = [row for row in rows if row.prompt not in known]
    assert [row.answer > 0 for row in new] == 3 * [True] + 2 * [False]
    # The subject is found in all of them: that is where a delta begins.
    assert all(0 < row.key < len(row.ids) - row.answer for row in new if row.answer)
    with pytest.raises(ValidationError, match="own_wordings"):
        EncodingConfig(own_wordings=-1)
