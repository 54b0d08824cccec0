"""The operator inside what looks for operators: transforms, batched gradients, forward mode."""

from __future__ import annotations

import pytest
import torch
from ops.operator_cases import make_inputs, run
from torch import Tensor
from torch.autograd import forward_ad

from gravity_hf.ops.chunked import gravity_attention_chunked

# 24 queries go through the operator, 3 would be decoded.
QUERIES = pytest.mark.parametrize("queries", [24, 3])


def call(inputs: dict[str, Tensor]) -> Tensor:
    return run(gravity_attention_chunked, inputs, causal=True)


@QUERIES
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_a_mapped_call_is_a_call_for_each(queries):
    inputs = make_inputs(queries=queries, keys=24)
    many = torch.stack([inputs["q"], 2 * inputs["q"]])
    mapped = torch.func.vmap(lambda q: call({**inputs, "q": q}))(many)
    torch.testing.assert_close(mapped, torch.stack([call({**inputs, "q": q}) for q in many]))


@pytest.mark.parametrize("table", [False, True], ids=["vectors", "table"])
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_gradients_in_a_batch_are_those_one_by_one(table):
    inputs = {name: x.requires_grad_() for name, x in make_inputs(keys=9, table=table).items()}
    output, leaves = call(inputs), [inputs["v"], inputs["mass"]]
    directions = torch.randn(2, *output.shape, dtype=output.dtype)
    options = {"retain_graph": True}
    batched = torch.autograd.grad(output, leaves, directions, is_grads_batched=True, **options)
    single = [torch.autograd.grad(output, leaves, x, **options) for x in directions]
    for actual, expected in zip(batched, zip(*single, strict=True), strict=True):
        assert torch.equal(actual, torch.stack(expected))


@QUERIES
@pytest.mark.parametrize("name", ["q", "inverse_distance"])
def test_forward_mode_is_refused_not_zero(queries, name):
    inputs = make_inputs(queries=queries, keys=24, table=name == "inverse_distance")
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match="without tangents"):
        call({**inputs, name: forward_ad.make_dual(inputs[name], inputs[name])})
