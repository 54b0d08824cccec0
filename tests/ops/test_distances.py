"""A table made in blocks: the formula's numbers and gradients, and memory for nothing else."""

from __future__ import annotations

import pytest
import torch

from gravity_hf.ops import blocks
from gravity_hf.ops.curvature import Curvature
from gravity_hf.ops.distances import inverse_distances

SPACES = {"flat": (0.3, None), "curved": (0.0, Curvature(1.4, 0.3)), "both": (0.2, Curvature(0.5))}


def written_out(queries, keys, eps, curvature):
    squared = (queries[..., :, None, :] - keys[..., None, :, :]).square().sum(-1)
    return 1 / ((squared if curvature is None else curvature.distance(squared)) + eps)


@pytest.mark.parametrize("elements", [2**18, 20], ids=["one_block", "many_blocks"])
@pytest.mark.parametrize("space", SPACES)
def test_table_and_gradients_are_the_formulas(space, elements, monkeypatch):
    monkeypatch.setitem(blocks.ELEMENTS, "cpu", elements)
    eps, curvature = SPACES[space]
    g = torch.Generator().manual_seed(1)
    for lead in ((), (2,), (2, 3)):
        keys = torch.randn(*lead, 9, 4, generator=g, dtype=torch.float64, requires_grad=True)
        queries = torch.randn(*lead, 5, 4, generator=g, dtype=torch.float64, requires_grad=True)
        for near in (queries, keys):
            expected = written_out(near, keys, eps, curvature)
            actual = inverse_distances(near, keys, eps=eps, curvature=curvature)
            torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
            direction = torch.randn(expected.shape, generator=g, dtype=torch.float64)
            leaves = [keys] if near is keys else [queries, keys]
            wanted = torch.autograd.grad(expected, leaves, direction)
            given = torch.autograd.grad(actual, leaves, direction)
            torch.testing.assert_close(given, wanted, rtol=1e-9, atol=1e-10)


def test_a_position_is_at_distance_0_from_itself():
    """In float32, far from the origin: the rounding of a product would say otherwise."""
    positions = 5.0 + 0.02 * torch.randn(300, 64, generator=torch.Generator().manual_seed(1))
    table = inverse_distances(positions, positions, eps=1e-6)
    assert (table.diagonal() == 1 / torch.tensor(1e-6)).all()
    exact = written_out(positions.double(), positions.double(), 1e-6, None)
    torch.testing.assert_close(table, exact.float(), rtol=1e-4, atol=0.0)


def test_what_does_not_fit_is_refused():
    p = torch.ones(3, 2)
    with pytest.raises(ValueError, match=r"expected queries .*got \(3, 2\) and \(3, 4\)"):
        inverse_distances(p, torch.ones(3, 4), eps=0.1)
    with pytest.raises(ValueError, match="eps: expected a number > 0, or 0 with a curvature"):
        inverse_distances(p, p, eps=0.0)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        p = p.requires_grad_()
        torch.autograd.grad(inverse_distances(p, p, eps=0.1).sum(), p, create_graph=True)
