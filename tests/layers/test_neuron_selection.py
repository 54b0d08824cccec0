"""Which blocks a token uses, what the predictor is to learn, and which neurons share a block."""

from __future__ import annotations

import math

import pytest
import torch

from gravity_hf.layers.neuron_order import co_active_order
from gravity_hf.layers.neuron_selection import (
    block_energy,
    blocks_kept,
    choice_loss,
    choice_quality,
    top_blocks,
)


@pytest.mark.parametrize(
    ("sparsity", "blocks", "keep"),
    [(0.8, 64, 13), (0.7, 10, 3), (0.8, 10, 2), (0.0, 7, 7), (0.99, 8, 1), (0.5, 5, 3)],
)
def test_kept_blocks_are_the_share_rounded_up(sparsity: float, blocks: int, keep: int) -> None:
    assert blocks_kept(sparsity, blocks) == keep


def test_choice_has_exactly_so_many_blocks_and_ties_go_to_the_lower_index() -> None:
    scores = torch.tensor([[1.0, 2.0, 2.0, 2.0, 0.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    assert top_blocks(scores, 2).tolist() == [[1, 2], [0, 1]]
    assert top_blocks(torch.zeros(3, 500), 40).tolist() == [list(range(40))] * 3


def test_energy_is_the_sum_of_squares_of_a_block() -> None:
    hidden = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    energy = block_energy(hidden, 2)
    assert energy.tolist() == [5.0, 25.0]
    assert not energy.requires_grad


def test_loss_is_chance_at_zero_scores_and_falls_with_the_right_ones() -> None:
    energy = torch.rand(30, 10)
    scores = torch.zeros(30, 10, requires_grad=True)
    for keep in (1, 5, 9):
        loss = choice_loss(scores, energy, keep)
        assert loss.item() == pytest.approx(math.log(2), abs=1e-6)
    (slope,) = torch.autograd.grad(choice_loss(scores, energy, 3), scores)
    best = torch.zeros(30, 10, dtype=torch.bool).scatter(1, energy.topk(3).indices, True)
    assert (slope[best] < 0).all()
    assert (slope[~best] > 0).all()


def test_loss_counts_real_tokens_only() -> None:
    torch.manual_seed(0)
    scores, energy = torch.randn(2, 3, 8), torch.rand(2, 3, 8)
    real = torch.tensor([[1, 1, 1], [0, 1, 0]])
    expected = torch.stack([choice_loss(scores[b, t], energy[b, t], 2) for b, t in real.nonzero()])
    torch.testing.assert_close(choice_loss(scores, energy, 2, real), expected.mean())
    assert choice_loss(scores, energy, 2, torch.zeros(2, 3)) == 0


def test_loss_of_nothing_to_choose_is_zero() -> None:
    scores = torch.randn(4, 6, requires_grad=True)
    loss = choice_loss(scores, torch.rand(4, 6), 6)
    assert loss == 0
    loss.backward()
    assert scores.grad.count_nonzero() == 0


def test_quality_counts_energy_and_best_blocks() -> None:
    energy = torch.tensor([[6.0, 3.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    chosen = torch.tensor([[0, 2], [0, 1]])
    quality = choice_quality(chosen, energy)
    assert quality.active == 0.5
    torch.testing.assert_close(quality.energy_recall, torch.tensor((0.7 + 1.0) / 2))
    torch.testing.assert_close(quality.gate_recall, torch.tensor((0.5 + 1.0) / 2))
    first = choice_quality(chosen, energy, torch.tensor([1, 0]))
    torch.testing.assert_close(first.energy_recall, torch.tensor(0.7))


def test_neurons_that_are_active_together_come_to_share_a_block() -> None:
    """Four groups of eight neurons, each active with its own tokens, dealt out over all places."""
    torch.manual_seed(0)
    groups = torch.arange(32) % 4
    activity = torch.randn(4, 200).abs()[groups] + 0.05 * torch.rand(32, 200)
    blocks = groups[co_active_order(activity, 8)].view(4, 8)
    assert (blocks == blocks[:, :1]).all()


def test_rounds_bring_a_block_closer_together() -> None:
    torch.manual_seed(0)
    activity = torch.rand(48, 60)

    def spread(rounds: int) -> float:
        blocks = activity[co_active_order(activity, 8, rounds=rounds)].unflatten(0, (-1, 8))
        return (blocks - blocks.mean(1, keepdim=True)).square().sum().item()

    assert spread(4) < spread(0)


def test_order_has_every_neuron_once_and_is_the_same_each_time() -> None:
    torch.manual_seed(0)
    activity = torch.rand(40, 30)
    order = co_active_order(activity, 8)
    assert order.sort().values.tolist() == list(range(40))
    assert torch.equal(co_active_order(activity, 8), order)


def test_order_needs_whole_blocks() -> None:
    with pytest.raises(ValueError, match="divisor of 10 neurons, got 4"):
        co_active_order(torch.rand(10, 3), 4)
