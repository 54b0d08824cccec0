"""Subspaces of updates: angles, and a basis that stays orthonormal however often it grows."""

from __future__ import annotations

import math

import pytest
import torch

from gravity_hf.knowledge.subspaces import (
    Basis,
    angle_score,
    joined,
    orthonormal,
    principal_angles,
    update_spans,
)


def columns(dim: int, count: int, seed: int) -> torch.Tensor:
    return torch.randn(dim, count, generator=torch.Generator().manual_seed(seed))


def off_orthonormal(q: torch.Tensor) -> float:
    q = q.double()
    return float((q.T @ q - torch.eye(q.shape[1], dtype=torch.float64)).abs().max())


@pytest.mark.parametrize("angle", [1e-9, 1e-4, 0.3, 1.0, math.pi / 2 - 1e-4, math.pi / 2])
def test_angle_between_two_planes_is_the_one_they_were_made_with(angle: float) -> None:
    axes = torch.eye(8, dtype=torch.float64)
    first = axes[:, :2]
    tilted = torch.stack([axes[:, 0] * math.cos(angle) + axes[:, 4] * math.sin(angle), axes[:, 5]])
    found = principal_angles(first, tilted.T)
    # float32 rounds what bases keep: 6e-8 of a coordinate.
    assert float(found[0]) == pytest.approx(angle, abs=1e-7)
    assert float(found[1]) == pytest.approx(math.pi / 2)


def test_score_is_zero_for_shared_and_one_for_orthogonal_directions() -> None:
    axes = torch.eye(6)
    assert angle_score(axes[:, :2], axes[:, 1:3]) == pytest.approx(0, abs=1e-6)
    assert angle_score(axes[:, :2], axes[:, 2:4]) == 1.0
    assert angle_score(axes[:, :2], torch.zeros(6, 0)) == 1.0


def test_score_does_not_depend_on_which_columns_span_the_subspace() -> None:
    a, b = columns(20, 3, 0), columns(20, 5, 1)
    mixed = a @ (columns(3, 3, 2) * 100)
    assert angle_score(mixed, b) == pytest.approx(angle_score(a, b), abs=1e-5)
    assert angle_score(b, a) == pytest.approx(angle_score(a, b), abs=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_refused(bad: float) -> None:
    broken = columns(6, 2, 0)
    broken[3, 1] = bad
    with pytest.raises(ValueError, match="finite"):
        principal_angles(columns(6, 2, 1), broken)
    with pytest.raises(ValueError, match="finite"):
        Basis(6).extended(broken)
    with pytest.raises(ValueError, match="finite"):
        update_spans(broken.T, columns(5, 2, 1))


def test_columns_of_other_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\(6, 2\) and \(5, 2\)"):
        principal_angles(columns(6, 2, 1), columns(5, 2, 1))
    with pytest.raises(ValueError, match=r"expected columns \[6, n\]"):
        Basis(6).extended(columns(5, 2, 1))


def test_basis_is_orthonormal_after_a_hundred_additions_of_nearly_dependent_columns() -> None:
    basis, shared = Basis(256), columns(256, 1, 1000)
    for seed in range(100):
        # All share one direction, as trained factors do, and differ by little.
        basis = basis.extended(shared + 1e-3 * columns(256, 2, seed))
    assert basis.rank == 200
    assert off_orthonormal(basis.columns) <= 1e-6


def test_basis_spans_exactly_what_was_added() -> None:
    parts = [columns(40, 3, seed) for seed in range(4)]
    basis = Basis(40)
    for part in parts:
        basis = basis.extended(part)
    q = basis.columns.double()
    everything = torch.cat(parts, 1).double()
    assert basis.rank == 12 and basis.free == 28
    assert float((everything - q @ (q.T @ everything)).norm()) < 1e-5


def test_dependent_and_zero_columns_take_no_capacity_and_lose_none() -> None:
    a, b = columns(30, 2, 0), columns(30, 1, 1)
    basis = Basis(30).extended(a)
    again = basis.extended(torch.cat([a @ columns(2, 2, 3), torch.zeros(30, 1), b], 1))
    assert again.rank == 3
    q = again.columns.double()
    assert float((b.double() - q @ (q.T @ b.double())).norm()) < 1e-5
    assert basis.rank == 2


def test_small_factors_count_by_direction() -> None:
    assert Basis(30).extended(1e-9 * columns(30, 2, 0)).rank == 2


def test_basis_cannot_outgrow_its_space() -> None:
    assert Basis(5).extended(columns(5, 9, 0)).rank == 5


def test_without_leaves_nothing_of_the_basis_and_all_of_the_rest() -> None:
    basis = Basis(64).extended(columns(64, 10, 0))
    rows = columns(64, 3, 1).T.contiguous()
    left = basis.without(rows)
    assert left.dtype == rows.dtype
    assert float((left @ basis.columns).abs().max()) < 1e-6
    assert float((basis.without(left) - left).abs().max()) < 1e-6
    assert angle_score(left.T, basis.columns) > 0.999


def test_joined_spans_all_of_its_bases() -> None:
    a, b = orthonormal(columns(20, 4, 0)), orthonormal(columns(20, 3, 1))
    both = joined([None, a, torch.zeros(20, 0), b])
    assert both is not None and both.shape == (20, 7)
    assert off_orthonormal(both) <= 1e-6
    assert joined([None, torch.zeros(20, 0)]) is None


def test_spans_of_an_update_are_those_of_the_product() -> None:
    a, b = columns(12, 2, 0).T, columns(9, 2, 1)
    # A third row that B ignores, and one that repeats the first.
    A = torch.cat([a, columns(12, 1, 2).T, a[:1]])
    B = torch.cat([b, torch.zeros(9, 1), b[:, :1]], 1)
    spans = update_spans(A, B)
    product = (B @ A).double()
    assert spans.input.shape == (12, 2) and spans.output.shape == (9, 2)
    into, out = spans.input.double(), spans.output.double()
    assert float((product - product @ into @ into.T).norm()) < 1e-5
    assert float((product - out @ (out.T @ product)).norm()) < 1e-5


def test_an_update_of_zero_occupies_nothing() -> None:
    spans = update_spans(columns(12, 2, 0).T, torch.zeros(9, 2))
    assert spans.input.shape == (12, 0) and spans.output.shape == (9, 0)


def test_factors_that_do_not_fit_each_other_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected A \[r, in\] and B \[out, r\]"):
        update_spans(columns(12, 2, 0).T, columns(9, 3, 1))
