"""Choosing tokens: seeds, penalties, ends."""

from __future__ import annotations

import pytest
import torch

from gravity_hf.knowledge.server.decoding import Text
from gravity_hf.knowledge.server.problems import ApiError
from gravity_hf.knowledge.server.sampling import Chooser, Sampling

LOGITS = torch.tensor([0.0, 1.0, 3.0, 2.9, -1.0])


def drawn(sampling: Sampling, count: int = 60) -> list[int]:
    chooser = Chooser(sampling)
    return [chooser.choose(LOGITS, []) for _ in range(count)]


def test_temperature_zero_takes_the_likeliest() -> None:
    assert set(drawn(Sampling())) == {2}


def test_a_seed_gives_the_same_draws_whoever_else_draws() -> None:
    first = drawn(Sampling(temperature=1.0, seed=5))
    torch.rand(3)
    assert drawn(Sampling(temperature=1.0, seed=5)) == first
    assert drawn(Sampling(temperature=1.0, seed=6)) != first


def test_draws_follow_the_probabilities() -> None:
    found = drawn(Sampling(temperature=2.0, seed=0), 1000)
    shares = torch.bincount(torch.tensor(found), minlength=5) / len(found)
    assert (shares - (LOGITS / 2).softmax(0)).abs().max() < 0.05


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(temperature=2.0, top_k=2, seed=0), {2, 3}),
        (Sampling(temperature=2.0, top_p=0.3, seed=0), {2}),
    ],
    ids=["top_k", "top_p"],
)
def test_only_the_likeliest_are_drawn(sampling: Sampling, allowed: set[int]) -> None:
    assert set(drawn(sampling)) == allowed


def test_penalties_are_taken_off_what_was_written() -> None:
    once = Chooser(Sampling(presence_penalty=0.2))
    assert once.choose(LOGITS, []) == 2 and once.choose(LOGITS, [2, 2]) == 3
    often = Chooser(Sampling(frequency_penalty=0.04))
    assert often.choose(LOGITS, [2, 2]) == 2 and often.choose(LOGITS, [2, 2, 2]) == 3


def test_an_end_token_is_no_part_of_the_text() -> None:
    text = Text([1], 5, ends=frozenset({2}))
    assert text.take(LOGITS) is None
    assert text.written == [] and text.finish_reason == "stop"


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_an_error(wrong: float) -> None:
    with pytest.raises(ApiError, match="not finite"):
        Text([1], 5).take(torch.tensor([0.0, wrong]))
