"""Centring and whitening against their definition in dense float64."""

from __future__ import annotations

import pytest
import torch

from gravity_hf.knowledge.errors import ValidationError
from gravity_hf.knowledge.whitening import Whitening


def _pool(n: int, d: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(n, d, generator=generator) * torch.logspace(-1, 2, d) + 5


@pytest.mark.parametrize(("n", "d"), [(40, 8), (6, 16), (1, 4)], ids=["many", "few", "one"])
@pytest.mark.parametrize("shrinkage", [0.05, 0.5, 1.0])
def test_it_is_the_inverse_root_of_the_shrunk_covariance(n, d, shrinkage):
    pool = _pool(n, d)
    queries = _pool(5, d) + torch.randn(5, d, generator=torch.Generator().manual_seed(1))
    centred = pool.double() - pool.double().mean(0)
    covariance = centred.T @ centred / n
    floor = shrinkage * covariance.trace() / d
    shrunk = (1 - shrinkage) * covariance + floor * torch.eye(d, dtype=torch.float64)
    if n == 1:
        shrunk = torch.eye(d, dtype=torch.float64)
    values, vectors = torch.linalg.eigh(shrunk)
    dense = (queries.double() - pool.double().mean(0)) @ vectors / values.sqrt() @ vectors.T
    expected = torch.nn.functional.normalize(dense, dim=-1)
    torch.testing.assert_close(Whitening(pool, shrinkage)(queries), expected, atol=1e-9, rtol=0)


def test_one_long_direction_no_longer_decides_the_cosine():
    pool = _pool(400, 8)
    squares = {}
    for shrinkage in (1.0, 1e-6):
        vectors = Whitening(pool, shrinkage)(pool)
        squares[shrinkage] = float((vectors[::2] * vectors[1::2]).sum(-1).square().mean())
    # Of vectors of equal spread it is 1 / d on average.
    assert squares[1e-6] == pytest.approx(1 / 8, abs=0.05)
    assert squares[1.0] > 0.5


def test_a_vector_at_the_mean_has_no_direction():
    pool = torch.tensor([[1.0, 2.0], [3.0, 2.0]])
    assert Whitening(pool)(torch.tensor([[2.0, 2.0]])).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("pool", "shrinkage"),
    [
        (torch.zeros(0, 3), 0.1),
        (torch.zeros(3), 0.1),
        (torch.full((2, 3), torch.nan), 0.1),
        (torch.ones(2, 3), 0.0),
        (torch.ones(2, 3), 1.5),
    ],
    ids=["empty", "flat", "nan", "none", "too much"],
)
def test_what_has_no_covariance_is_refused(pool, shrinkage):
    with pytest.raises(ValidationError, match="Whitening"):
        Whitening(pool, shrinkage)
