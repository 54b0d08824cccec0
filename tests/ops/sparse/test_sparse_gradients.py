"""Gradients of sparse attention: those of its definition, for the same choice of keys."""

import pytest
import torch
from ops.sparse.sparse_cases import SCORES, budget, mask_of, score_of, vectors

from gravity_hf.ops.sparse import DotProduct, Gravity, select_keys, sparse_attention

IMPLEMENTATIONS = ("masked", "gathered", "routed")


def gradients(impl, name, mask_name):
    q, k, v = (x.double().requires_grad_() for x in vectors())
    score = score_of(name, torch.float64)
    mask = mask_of(mask_name)
    leaves = [q, k, v, *(x.requires_grad_() for x in score.tensors)]
    output = sparse_attention(q, k, v, score=score, budget=budget(), mask=mask, impl=impl)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    return torch.autograd.grad(output, leaves, direction.double())


@pytest.mark.parametrize("mask", ["none", "left", "documents"])
@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("impl", IMPLEMENTATIONS)
def test_gradients_are_those_of_the_definition(impl, score, mask):
    expected = gradients("reference", score, mask)
    for actual, exact in zip(gradients(impl, score, mask), expected, strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("impl", ["reference", "gathered", "routed"])
@pytest.mark.parametrize("law", ["dot", "power", "force"])
def test_gradients_are_derivatives(law, impl):
    g = torch.Generator().manual_seed(0)
    shapes = [(1, 2, 14, 3), (1, 1, 14, 3), (1, 1, 14, 2)]
    inputs = [torch.randn(x, generator=g, dtype=torch.float64) for x in shapes]
    few = budget(2, top_k=6, window=2, sinks=1)
    selection = select_keys(*inputs[:2], few, metric="dot")
    mass = [0.5 + torch.rand(2, generator=g, dtype=torch.float64) for _ in range(2)]

    def attend(q, k, v, *tensors):
        score = Gravity(*tensors, law) if tensors else DotProduct(0.5)
        options = {"score": score, "budget": few, "selection": selection, "impl": impl}
        return sparse_attention(q, k, v, **options)

    inputs = [x.requires_grad_() for x in (inputs if law == "dot" else inputs + mass)]
    assert torch.autograd.gradcheck(attend, inputs, fast_mode=True)


def test_empty_places_of_a_tile_stay_out_of_the_gradient():
    """Under this law the weight of nobody's query would be infinite."""
    q, k, v = (x.requires_grad_() for x in vectors())
    score = Gravity(torch.full((4,), 30.0), torch.full((4,), 1e-6))
    output = sparse_attention(q, k, v, score=score, budget=budget(), impl="routed")
    assert all(x.isfinite().all() for x in torch.autograd.grad(output.sum(), (q, k, v)))
