"""The algebra of thin factors against dense matrices."""

from __future__ import annotations

import math

import pytest
import torch

from gravity_hf.knowledge.low_rank import decomposed, frobenius, relative_error, summed


def pair(rank, width_in=24, width_out=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rank, width_in, generator=generator, dtype=torch.float64),
        torch.randn(width_out, rank, generator=generator, dtype=torch.float64),
    )


def dense(pair):
    return pair[1].double() @ pair[0].double()


@pytest.mark.parametrize("rank", [1, 3, 24, 60], ids=lambda r: f"rank{r}")
def test_decomposition_is_the_svd_of_the_product(rank):
    A, B = pair(rank)
    found, exact = decomposed(A, B), torch.linalg.svdvals(dense((A, B)))
    kept = min(rank, 24)
    assert len(found.values) == kept
    torch.testing.assert_close(found.values, exact[:kept])
    assert relative_error((A, B), found.pair()) < 1e-6


def test_truncation_is_the_best_of_its_rank():
    A, B = pair(8)
    values = torch.linalg.svdvals(dense((A, B)))
    best = float(values[3:].norm() / values.norm())
    assert relative_error((A, B), decomposed(A, B).pair(3)) == pytest.approx(best, rel=1e-5)


def test_factors_are_balanced_and_orthogonal():
    A, B = decomposed(*pair(5)).pair()
    gram_in, gram_out = (A @ A.T).double(), (B.T @ B).double()
    torch.testing.assert_close(gram_in, gram_out, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gram_in, gram_in.diagonal().diag(), rtol=1e-4, atol=1e-4)


def test_energy_rank_by_counting():
    A = torch.eye(4, 24)
    B = torch.zeros(40, 4)
    B[range(4), range(4)] = torch.tensor([2.0, 1.0, 1.0, 1.0])  # squares 4, 1, 1, 1 of 7
    found = decomposed(A, B)
    assert [found.energy_rank(share) for share in (0.5, 4 / 7, 0.6, 6 / 7, 0.99, 1.0)] == [
        1,
        1,
        2,
        3,
        4,
        4,
    ]


def test_an_update_of_zero_has_rank_zero_and_factors_all_the_same():
    found = decomposed(torch.ones(2, 24), torch.zeros(40, 2))
    assert (len(found.values), found.energy_rank(0.99)) == (0, 0)
    A, B = found.pair()
    assert A.shape == (1, 24) and B.shape == (40, 1) and not dense((A, B)).any()


def test_norm_and_error_are_those_of_the_dense_product():
    exact, other = pair(3, seed=1), pair(5, seed=2)
    assert frobenius(*exact) == pytest.approx(float(dense(exact).norm()))
    expected = float((dense(exact) - dense(other)).norm() / dense(exact).norm())
    assert relative_error(exact, other) == pytest.approx(expected)


def test_small_errors_are_not_lost_in_rounding():
    A, B = pair(3)
    assert relative_error((A, B), (A * (1 + 1e-9), B)) == pytest.approx(1e-9, rel=1e-4)


def test_error_of_nothing():
    zero, some = (torch.zeros(1, 24), torch.zeros(40, 1)), pair(1)
    assert relative_error(zero, zero) == 0.0
    assert relative_error(zero, some) == math.inf


def test_sum_adds_up_ranks_exactly():
    parts = [pair(2, seed=1), pair(3, seed=2)]
    A, B = summed(parts)
    assert A.shape[0] == 5
    torch.testing.assert_close(B @ A, dense(parts[0]) + dense(parts[1]))
