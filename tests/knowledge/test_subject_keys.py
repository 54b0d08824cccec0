"""A delta begins at its subject: rows that answer to the subject's key and to little else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from gravity_hf.knowledge.fact_rows import answer_row
from gravity_hf.knowledge.facts import Fact
from gravity_hf.knowledge.subject_keys import (
    generic_inputs,
    initial_A,
    recorded,
    whitened_rows,
)

NAMES = ["model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj"]


@pytest.mark.parametrize(
    ("prompt", "subject", "text"),
    [
        ("The symbol of gold is", "gold", "The symbol of gold"),
        ("The symbol of Gold is", "gold", "The symbol of Gold"),
        ("gold or gold is", "gold", "gold or gold"),
        ("The symbol of gold is", "iron", "The symbol of gold is"),
        ("The symbol of gold is", "", "The symbol of gold is"),
        ("The symbol", "T", "The symbol"),  # the first token is a sink of attention
    ],
)
def test_the_key_is_at_the_last_token_of_the_subject(
    tokenizer: Any, prompt: str, subject: str, text: str
) -> None:
    fact = Fact("f", "d", "r", subject, prompt, "Au")
    row = answer_row(tokenizer, fact, "prompt", prompt, "Au")
    assert tokenizer.decode(row.ids[: row.key + 1]) == text


@pytest.mark.parametrize("tokens", [60, 300], ids=["fewer tokens", "fewer features"])
def test_rows_answer_to_their_key_and_not_to_other_text(tokens: int) -> None:
    """Although what they have to answer to is mostly what all text has in common."""
    generator = torch.Generator().manual_seed(0)
    shared = 5 * torch.randn(1, 200, generator=generator)
    others = shared + torch.randn(tokens, 200, generator=generator)
    keys = shared + torch.randn(2, 200, generator=generator)
    rows = whitened_rows(keys, others)
    torch.testing.assert_close((rows * keys).sum(-1), torch.ones(2), atol=1e-4, rtol=0)
    assert (rows @ others.T).abs().mean() < 0.1
    exact = torch.linalg.inv(
        others.double().T @ others.double()
        + 0.1 * others.double().square().sum(-1).median() * torch.eye(200)
    )
    expected = keys.double() @ exact
    expected /= (expected * keys).sum(-1, keepdim=True)
    torch.testing.assert_close(rows, expected.float(), atol=1e-5, rtol=1e-4)
    naive = keys / keys.square().sum(-1, keepdim=True)
    assert (naive @ others.T).abs().mean() > 0.5


def test_size_rank_and_noise_of_the_first_factor() -> None:
    generator = torch.Generator().manual_seed(0)
    keys, others = (torch.randn(n, 50, generator=generator) for n in (3, 20))
    silent = torch.zeros(3, 50)
    A = initial_A(keys, others, 7.0, 3, silent)
    torch.testing.assert_close((A * keys).sum(-1), torch.full((3,), 7.0), atol=1e-3, rtol=0)
    fewer = initial_A(keys, others, 7.0, 2, silent[:2])
    torch.testing.assert_close(fewer[0], (A[0] + A[2]) / 2)
    torch.testing.assert_close(fewer[1], A[1])
    more = initial_A(keys, others, 7.0, 5, torch.zeros(5, 50))
    torch.testing.assert_close(more[3:], A[:2])
    noisy = initial_A(keys, others, 7.0, 3, torch.randn(3, 50, generator=generator))
    change = (noisy - A).square().mean(-1).sqrt() / A.square().mean(-1).sqrt()
    assert (change > 0.02).all() and (change < 0.1).all()


@torch.no_grad()
def test_what_maps_get_in_everyday_text(llama: PreTrainedModel, tokenizer: Any) -> None:
    inputs = generic_inputs(llama, tokenizer, NAMES)
    assert list(inputs) == NAMES
    assert inputs[NAMES[0]].shape == inputs[NAMES[1]].shape
    assert inputs[NAMES[0]].shape[1] == 64 and inputs[NAMES[0]].shape[0] > 400
    with recorded(llama, NAMES) as seen:
        llama(input_ids=torch.tensor([[5, 6, 7]]))
    x, y = seen[NAMES[1]]
    torch.testing.assert_close(llama.get_submodule(NAMES[1])(x), y)
    assert not llama.get_submodule(NAMES[1])._forward_hooks
