"""Distances between positions: exact where it matters, in any place of space."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gravity_hf.layers.distance import inverse_distance, squared_distances


def direct(queries: Tensor, keys: Tensor) -> Tensor:
    return (queries.unsqueeze(-2) - keys.unsqueeze(-3)).square().sum(-1)


@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_distances_are_those_of_differences_wherever_the_positions_lie(shift: float) -> None:
    queries, keys = torch.randn(2, 5, 12) + shift, torch.randn(2, 7, 12) + shift
    exact = direct(queries.double(), keys.double())
    # Of unshifted positions a Gram matrix knows the square to a few roundings of |q|^2 + |k|^2.
    error = (squared_distances(queries, keys).double() - exact).abs().max()
    assert error <= 32 * torch.finfo(torch.float32).eps * exact.max()


@pytest.mark.parametrize("copied", [False, True], ids=["same tensor", "copy"])
def test_equal_rows_are_exactly_0_apart_and_have_no_gradient(copied: bool) -> None:
    rows = torch.randn(40, 16, requires_grad=True)
    keys = rows.detach().clone()[:3] if copied else rows
    squared = squared_distances(rows, keys)
    own = squared.diagonal()
    assert torch.equal(own, torch.zeros_like(own))
    own.sum().backward()
    assert torch.equal(rows.grad, torch.zeros_like(rows))


def test_one_query_among_its_own_keys_is_0_from_itself() -> None:
    keys = torch.randn(40, 16) * 3
    assert squared_distances(keys[17:18].clone(), keys)[0, 17] == 0


def test_gradient_of_distances_is_that_of_differences() -> None:
    queries = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    keys = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn(5, 6, dtype=torch.float64)
    grads = [
        torch.autograd.grad((function(queries, keys) * cotangent).sum(), (queries, keys))
        for function in (squared_distances, direct)
    ]
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("width", [1, 4, 12])
def test_exact_distances_tell_neighbours_apart_in_a_wide_set(width: int) -> None:
    """Once two clusters far apart were two points: a Gram matrix saw no more of them."""
    points = torch.randn(30, width)
    points[::2] += 1000.0
    points[7] = points[5]
    points.requires_grad_()
    found = squared_distances(points, points, exact=True)
    exact = direct(points.double(), points.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-6, atol=0)
    assert found[7, 5] == 0
    cotangent = torch.randn(30, 30)
    grads = [
        torch.autograd.grad((x * cotangent).sum(), points, retain_graph=True)[0]
        for x in (found, exact)
    ]
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-2)


def test_distances_are_float32_in_half_precision_and_under_autocast() -> None:
    rows = torch.randn(6, 8)
    half = rows.bfloat16()
    assert torch.equal(squared_distances(half, half), squared_distances(half.float(), half.float()))
    outside = squared_distances(rows, rows)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(squared_distances(rows, rows), outside)


@pytest.mark.parametrize("curvature", [0.0, 0.15, -0.1, 1.5])
@pytest.mark.parametrize("softening", [0.0, 0.2])
def test_inverse_distance_is_the_formula(curvature: float, softening: float) -> None:
    squared = torch.tensor([0.0, 1e-7, 0.3, 9.0, 40.0], dtype=torch.float64)
    horizon = 1e-3
    found = inverse_distance(
        squared, curvature=curvature, event_horizon=horizon, softening=softening
    )
    for s, value in zip(squared.tolist(), found.tolist(), strict=True):
        if curvature == 0.0:
            distance = s + horizon
        else:
            distance = max(s * (1 + curvature * math.cos(math.sqrt(s + horizon))), horizon)
        assert value == pytest.approx(1 / (distance + softening), rel=1e-12)


def test_gradient_of_inverse_distance_is_finite_without_a_horizon() -> None:
    squared = torch.tensor([0.0, 0.5], requires_grad=True)
    inverse_distance(squared, curvature=0.15, event_horizon=0.0, softening=0.2).sum().backward()
    assert squared.grad.isfinite().all()


@pytest.mark.parametrize(
    "space",
    [
        {"curvature": math.nan, "event_horizon": 1e-6},
        {"curvature": 0.1, "event_horizon": -1.0},
        {"curvature": 0.1, "event_horizon": 1e-6, "softening": math.inf},
        {"curvature": 0.1, "event_horizon": 0.0, "softening": 0.0},
    ],
)
def test_spaces_without_finite_forces_are_refused(space: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="expected"):
        inverse_distance(torch.ones(2), **space)


def test_positions_of_different_width_are_refused() -> None:
    with pytest.raises(ValueError, match="the same width P"):
        squared_distances(torch.ones(3, 4), torch.ones(3, 5))
