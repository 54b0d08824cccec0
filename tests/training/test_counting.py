"""Unigram and bigram baselines are honest: smoothed on training text, exact on what they count."""

from __future__ import annotations

import math

import pytest
import torch

from gravity_hf.training.counting import CONSTANTS, fit_counts


def markov_text(tokens: int, seed: int) -> torch.Tensor:
    """Of four tokens each is followed by the next, or in a quarter of all cases by token 0."""
    jumps = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < 0.25
    ids = [0]
    for jump in jumps[1:].tolist():
        ids.append(0 if jump else (ids[-1] + 1) % 4)
    return torch.tensor(ids, dtype=torch.uint8)


@pytest.mark.parametrize("order", [1, 2])
def test_probabilities_sum_to_one(order: int) -> None:
    model = fit_counts(markov_text(1000, 0), 7, order)
    sums = model.log_probabilities.exp().sum(-1)
    assert torch.allclose(sums, torch.ones_like(sums), atol=1e-12)
    assert model.log_probabilities.isfinite().all() and model.constant in CONSTANTS


def test_a_bigram_finds_the_entropy_of_a_text_of_bigrams() -> None:
    model = fit_counts(markov_text(60_000, 0), 4, 2)
    # A token that may be followed by 0 alone has none.
    entropy = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    held_out = markov_text(20_000, 1)
    undecided = (held_out[:-1] != 3).double().mean().item()
    assert model.loss(held_out.view(-1, 100).split(8)) == pytest.approx(
        entropy * undecided, rel=0.02
    )


def test_a_unigram_finds_the_frequencies() -> None:
    text = torch.tensor([0, 0, 0, 1] * 5000)
    probabilities = fit_counts(text, 2, 1).log_probabilities.exp()
    assert probabilities.tolist() == pytest.approx([0.75, 0.25], abs=1e-2)


def test_the_loss_is_that_of_a_language_model() -> None:
    """Every token but the first of a window, given the one before it."""
    model = fit_counts(markov_text(5000, 0), 4, 2)
    window = torch.tensor([[0, 1, 2], [3, 0, 0]])
    logs = model.log_probabilities
    expected = -(logs[0, 1] + logs[1, 2] + logs[3, 0] + logs[0, 0]).item() / 4
    assert model.loss([window]) == pytest.approx(expected)


def test_what_never_occurred_costs_more_where_there_was_more_text() -> None:
    """The constant is chosen by the training text: a text without surprises wants a small one."""
    regular = torch.arange(40_000) % 16
    noise = torch.randint(0, 64, (400,), generator=torch.Generator().manual_seed(0))
    assert fit_counts(regular, 64, 2).constant == CONSTANTS[0]
    assert fit_counts(noise, 64, 2).constant > CONSTANTS[2]


def test_what_cannot_be_counted_is_refused() -> None:
    text = markov_text(100, 0)
    with pytest.raises(ValueError, match="order 1 or 2"):
        fit_counts(text, 4, 3)
    with pytest.raises(ValueError, match="vocabulary of 1 to"):
        fit_counts(text, 1_000_000, 2)
    with pytest.raises(ValueError, match="20 tokens or more, got 10"):
        fit_counts(text[:10], 4, 1)
    with pytest.raises(ValueError, match="at least two tokens"):
        fit_counts(text, 4, 1).loss([])
