"""What a delta is kept clear of while it trains: slices, and a pull away from others."""

from __future__ import annotations

import pytest
import torch

from gravity_hf.knowledge.leakage import SecondMoment
from gravity_hf.knowledge.registry_projection import BusyDirections, sliced, softened
from gravity_hf.knowledge.subspaces import orthonormal

WIDTH = 12


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outside(rows: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    return rows - rows @ columns @ columns.T


@pytest.mark.parametrize("taken", [None, orthonormal(seeded(WIDTH, 2, seed=5))])
def test_slices_are_orthogonal_to_each_other_and_to_what_is_taken(taken) -> None:
    rows = []
    for part in range(3):
        into, out = sliced(lambda name: (taken, None), {"map": WIDTH}, part, 3)("map")
        assert out is None
        assert torch.allclose(into.T @ into, torch.eye(into.shape[1]), atol=1e-6)
        left = outside(seeded(1, WIDTH, seed=part), into)
        assert left.norm() > 1e-3  # something is left to train
        assert taken is None or float((left @ taken).abs().max()) < 1e-6
        rows.append(left / left.norm())
    overlaps = torch.cat(rows) @ torch.cat(rows).T
    assert torch.allclose(overlaps, torch.eye(3), atol=1e-6)


def test_one_slice_of_one_is_everything() -> None:
    def project(name: str) -> tuple[None, None]:
        return None, None

    assert sliced(project, {"map": WIDTH}, 0, 1) is project


def test_a_penalty_takes_its_share_of_the_overlap_and_nothing_else() -> None:
    into, out = orthonormal(seeded(WIDTH, 3)), orthonormal(seeded(5, 1))
    soft_in, soft_out = softened(lambda name: (into, out), 0.25)("map")
    A = seeded(2, WIDTH, seed=1)
    pulled = outside(A, soft_in)
    assert torch.allclose(pulled @ into, 0.75 * (A @ into), atol=1e-6)
    assert torch.allclose(outside(pulled, into), outside(A, into), atol=1e-6)
    assert torch.allclose(soft_out, out / 2)
    assert softened(lambda name: (None, None), 0.25)("map") == (None, None)
    whole, _ = softened(lambda name: (into, None), 1.0)("map")
    assert torch.equal(whole, into)


def test_busy_directions_of_a_moment_measured_again_are_worked_out_again() -> None:
    busy = BusyDirections()

    def moment(seed: int) -> dict[str, SecondMoment]:
        return {"map": SecondMoment(seeded(2, WIDTH, seed=seed), 2, 1.0)}

    first, second = moment(0), moment(1)
    (found,) = busy.all_of({"id": first}, "map", 0.0)
    assert busy.all_of({"id": first}, "map", 0.0)[0] is found
    (other,) = busy.all_of({"id": second}, "map", 0.0)
    assert not torch.equal(found, other)
    assert busy.all_of({"id": first}, "elsewhere", 0.0) == []
