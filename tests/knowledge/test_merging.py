"""Merged deltas: what can be left out, and what cannot."""

from __future__ import annotations

import pytest
import torch

from gravity_hf.knowledge.delta import LowRankDelta
from gravity_hf.knowledge.errors import ValidationError
from gravity_hf.knowledge.merging import merged
from gravity_hf.knowledge.residual_delta import ResidualDelta

IN, OUT = 48, 40


def orthogonal_deltas(count, rank=2):
    """They read and write directions that no other one does, all with the same strength."""
    generator = torch.Generator().manual_seed(0)
    Q_in = torch.linalg.qr(torch.randn(IN, IN, generator=generator)).Q
    Q_out = torch.linalg.qr(torch.randn(OUT, OUT, generator=generator)).Q
    return [
        LowRankDelta({"m": (Q_in[i : i + rank], Q_out[:, i : i + rank])})
        for i in range(0, count * rank, rank)
    ]


def random_delta(seed, names=("m",), rank=2):
    generator = torch.Generator().manual_seed(seed)
    return LowRankDelta(
        {
            name: (
                torch.randn(rank, IN, generator=generator),
                torch.randn(OUT, rank, generator=generator),
            )
            for name in names
        }
    )


@pytest.mark.parametrize("count", [2, 5, 10])
def test_orthogonal_deltas_cannot_be_compressed(count):
    found = merged(orthogonal_deltas(count), 0.99).modules["m"]
    assert found.rank_before == found.directions == found.rank_sum == found.rank_after == 2 * count


def test_what_deltas_share_is_kept_once():
    delta = random_delta(0)
    found = merged([delta, delta.scaled(0.5), delta.scaled(0.25)], 1.0)
    assert found.modules["m"].rank_before == 6 and found.modules["m"].rank_after == 2
    torch.testing.assert_close(found.delta.update("m"), delta.update("m") * 1.75)


def test_same_directions_written_are_kept_once_though_all_are_read():
    """B (A1 + A2) has rank 1, while a registry counts the two directions that are read."""
    B = torch.randn(OUT, 1, generator=torch.Generator().manual_seed(0))
    first, second = (LowRankDelta({"m": (torch.eye(1, IN).roll(i, 1), B)}) for i in range(2))
    found = merged([first, second], 0.99).modules["m"]
    assert (found.directions, found.rank_sum, found.rank_after) == (2, 1, 1)


@pytest.mark.parametrize("energy", [0.5, 0.9, 0.99, 1.0])
def test_energy_and_error_are_those_of_the_dense_sum(energy):
    deltas = [random_delta(seed) for seed in range(6)]
    found = merged(deltas, energy)
    module, dense = found.modules["m"], sum(delta.update("m") for delta in deltas)
    assert module.energy >= energy - 1e-9
    error = (found.delta.update("m") - dense).norm() / dense.norm()
    assert module.error == pytest.approx(float(error), abs=2e-6)
    assert module.error == pytest.approx((1 - module.energy) ** 0.5, abs=1e-6)
    # One rank less would keep too little.
    values = torch.linalg.svdvals(dense.double()).square()
    assert values[: module.rank_after - 1].sum() / values.sum() < energy


def test_maps_that_only_some_deltas_change():
    first, second = random_delta(0, ("a", "b")), random_delta(1, ("b", "c"))
    found = merged([first, second], 1.0)
    assert list(found.delta.factors) == ["a", "b", "c"]
    torch.testing.assert_close(found.delta.update("c"), second.update("c"))
    torch.testing.assert_close(found.delta.update("b"), first.update("b") + second.update("b"))


def test_blocks_stay_blocks_and_do_not_mix_with_maps():
    block = ResidualDelta({"m": (torch.ones(1, IN), torch.ones(IN, 1))})
    assert type(merged([block, block]).delta) is ResidualDelta
    with pytest.raises(ValidationError, match="one kind"):
        merged([block, random_delta(0)])


@pytest.mark.parametrize("energy", [0.0, 1.1, -1.0])
def test_impossible_shares_are_refused(energy):
    with pytest.raises(ValidationError, match="energy"):
        merged([random_delta(0)], energy)
    with pytest.raises(ValidationError, match="one kind"):
        merged([], 0.9)
