"""TF-IDF against numbers worked out by hand."""

from __future__ import annotations

import math

import pytest

from gravity_hf.knowledge.errors import ValidationError
from gravity_hf.knowledge.lexical import Tfidf, words


def test_words_are_case_folded_runs_of_letters_and_digits():
    assert words("The H2O-molecule, STRASSE and straße!") == [
        *("the", "h2o", "molecule", "strasse", "and", "strasse")
    ]


def test_scores_are_cosines_of_sublinear_tf_times_smooth_idf():
    index = Tfidf().fit(["gold gold iron", "iron tin"])
    # n = 2: iron is in both texts, gold and tin in one, lead in none.
    iron, rare, unseen = 1.0, math.log(3 / 2) + 1, math.log(3) + 1
    gold = (1 + math.log(2)) * rare
    first = math.hypot(gold, iron)
    query = math.hypot(rare, iron, unseen)
    expected = [(gold * rare + iron * iron) / first / query, iron / math.hypot(iron, rare) / query]
    assert index.scores("Iron, gold; lead").tolist() == pytest.approx(expected, abs=1e-14)


def test_a_text_scores_one_with_itself_and_zero_with_foreign_words():
    index = Tfidf().fit(["the symbol of gold", "a byte has bits"])
    assert index.scores("The symbol of GOLD").tolist() == pytest.approx([1.0, 0.0], abs=1e-14)
    assert index.scores("zebra").tolist() == [0.0, 0.0]
    assert index.scores("").tolist() == [0.0, 0.0]


def test_words_that_no_text_has_lower_the_score():
    index = Tfidf().fit(["the capital of france", "the capital of spain"])
    known, foreign = index.scores("the capital of"), index.scores("the capital of atlantis")
    assert (foreign < known).all()


def test_without_an_index_it_says_what_to_do():
    with pytest.raises(ValidationError, match="fit"):
        Tfidf().scores("gold")
