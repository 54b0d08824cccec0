"""Sinks in the Triton kernels: forward, gradients and few queries."""

from __future__ import annotations

import math

import pytest
import torch
from helpers import assert_within_budget
from ops.operator_cases import (
    cast,
    make_inputs,
    packed_ranges,
    padding_mask,
    run,
    values_and_gradients,
)
from ops.triton_cases import DEVICE, check, check_budgets, kernel_results, moved, require_kernels

from gravity_hf.ops import gravity_attention
from gravity_hf.ops.reference import gravity_attention_reference
from gravity_hf.ops.triton import gravity_attention_triton

require_kernels()

LAW_AND_DISTANCE = pytest.mark.parametrize(
    ("law", "lifted"), [(law, lifted) for law in ("force", "power") for lifted in (False, True)]
)


def float_mask(queries, keys):
    mask = torch.randn(2, 4, queries, keys, generator=torch.Generator().manual_seed(1)).double()
    mask[mask > 1.0] = -math.inf
    mask[0, 1, 2] = -math.inf
    return mask


@LAW_AND_DISTANCE
def test_values_and_all_gradients(law, lifted):
    """Rows that see nothing but the sink, by position and by mask."""
    given = {"value_width": 5, "lifted": lifted, "law": law}
    inputs = make_inputs(batch=1, queries=70, keys=40, sinks="head", **given)
    check(inputs, law=law, causal=True)
    inputs = make_inputs(queries=20, keys=70, sinks="row", **given)
    check(inputs, law=law, mask=float_mask(20, 70))


@pytest.mark.parametrize(
    "rules",
    [
        {"window": 9, "causal": True},
        {"key_ranges": packed_ranges(20, 0, 1, 49), "causal": True},
        {"mask": padding_mask(1, 70, "left")},
    ],
    ids=["window", "packed", "left"],
)
def test_values_and_all_gradients_of_every_rule(rules):
    shape = {"batch": 1, "heads": 2, "key_heads": 1, "queries": 70, "keys": 70}
    check(make_inputs(**shape, lifted=True, sinks="head"), **rules)


# Of hidden pairs, whose weights are then not taken.
@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")
@pytest.mark.parametrize("height", [-math.inf, -300.0, 0.0, 300.0], ids=str)
@pytest.mark.parametrize("mask", [None, "float"], ids=["bounded", "online"])
def test_a_sink_far_above_or_below_the_keys(mask, height):
    """With a float mask no bounds of the scores are known."""
    inputs = make_inputs(queries=20, keys=30, sinks="head")
    inputs["sinks"] = torch.full_like(inputs["sinks"], height)
    options = {"causal": True, "mask": None if mask is None else float_mask(20, 30).float()}
    expected = values_and_gradients(gravity_attention_reference, inputs, **options)
    actual = kernel_results(cast(inputs, torch.float32), **options)
    for name, value in actual.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-4, atol=1e-5, msg=name)
    if height > 0:
        assert (actual["output"] == 0).all()


@pytest.mark.parametrize(
    ("law", "dtype"), [("force", torch.bfloat16), ("power", torch.float16)], ids=str
)
def test_half_precision_stays_in_its_budget(law, dtype):
    shape = {"batch": 1, "queries": 33, "keys": 40, "width": 16, "law": law, "sinks": "head"}
    cases = [make_inputs(**shape, seed=seed) for seed in range(3)]
    check_budgets(dtype, cases, law=law, causal=True)


@pytest.mark.parametrize("law", ["force", "power"])
def test_sinks_and_masses_get_an_exact_gradient_where_scores_hardly_differ(law):
    """A soft head in half precision: the rounding of the output must not reach the sums of scores,
    of which the sink has a part."""
    shape = {"batch": 1, "heads": 2, "key_heads": 1, "queries": 64, "keys": 64, "width": 32}
    inputs = make_inputs(**shape, law=law, lifted=True, sinks="head")
    inputs["eps"] = inputs["eps"] + 2000.0
    inputs["mass"] = inputs["mass"] + (40.0 if law == "force" else 4.0)
    # Half of the weight, beside 64 keys.
    inputs["sinks"] = torch.full_like(inputs["sinks"], 4.0)
    given = cast(inputs, torch.bfloat16)
    doubles = {name: x.double() for name, x in given.items()}
    expected = values_and_gradients(gravity_attention_reference, doubles, law=law)
    actual = kernel_results(given, law=law)
    for name in ("mass", "eps", "key_radius_sq", "sinks"):
        error = (actual[name].double() - expected[name]).abs().max() / expected[name].abs().max()
        assert error < 0.02, f"{name}: {error:.1e}"


def test_frozen_masses_leave_the_gradients_of_queries_keys_values_and_sinks():
    inputs = moved(cast(make_inputs(batch=1, queries=20, keys=20, sinks="head"), torch.float32))
    expected = values_and_gradients(gravity_attention_triton, inputs, causal=True)
    wanted = ("q", "k", "v", "sinks")
    leaves = {name: x.clone().requires_grad_(name in wanted) for name, x in inputs.items()}
    output = run(gravity_attention_triton, leaves, causal=True)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output)
    gradients = torch.autograd.grad(output, [leaves[name] for name in wanted], direction)
    for name, value in zip(wanted, gradients, strict=True):
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize(("queries", "splits"), [(3, 1), (1, 3)])
@LAW_AND_DISTANCE
def test_few_queries(law, lifted, queries, splits, monkeypatch):
    """The sink counts once, however many programs share the keys."""
    decode = pytest.importorskip("gravity_hf.ops.triton.decode")
    calls = []

    def tiling(*_):
        calls.append(splits)
        return decode.Tiling(splits=splits, block_keys=16, warps=4, stages=2)

    monkeypatch.setattr(decode, "choose_tiling", tiling)
    shape = {"queries": queries, "keys": 45, "width": 16}
    inputs = make_inputs(**shape, lifted=lifted, law=law, sinks="row" if splits == 1 else "head")
    mask = torch.rand(2, 1, queries, 45, generator=torch.Generator().manual_seed(1)) > 0.3
    mask[0, :, 0] = False
    for dtype in (torch.float32, torch.bfloat16):
        x = cast(inputs, dtype)
        doubles = {name: value.double() for name, value in x.items()}
        exact = run(gravity_attention_reference, doubles, law=law, mask=mask)
        peer = run(gravity_attention_reference, x, law=law, mask=mask)
        actual = run(gravity_attention_triton, moved(x), law=law, mask=mask.to(DEVICE)).cpu()
        # The kernel rounds weights to the dtype of v; the reference keeps them in float32.
        factor = 2.0 if dtype == torch.float32 else 4.0
        assert_within_budget("output", actual, exact, peer, factor=factor)
        assert (actual[0, :, 0] == 0).all()
    assert len(calls) == 2


@pytest.mark.parametrize("law", ["force", "power"])
def test_few_queries_under_a_soft_head_keep_the_sinks_share(law):
    """Calibrated: scores of hundreds that differ by little, in float32."""
    inputs = make_inputs(queries=1, keys=40, width=32, law=law, lifted=True, sinks="head")
    inputs["eps"] = inputs["eps"] + 2000.0
    inputs["mass"] = inputs["mass"] + (40.0 if law == "power" else 1700.0)
    expected = run(gravity_attention_reference, inputs, law=law)
    actual = run(gravity_attention_triton, moved(cast(inputs, torch.float32)), law=law).cpu()
    torch.testing.assert_close(actual.double(), expected, rtol=2e-3, atol=2e-4)


def test_torch_knows_the_operator_with_sinks():
    """Compiled without a break, the same values and gradients as eager."""
    inputs = moved(
        cast(make_inputs(batch=1, queries=20, keys=24, width=16, sinks="head"), torch.float32)
    )

    def function(*tensors, **options):
        return gravity_attention(*tensors, impl="triton", **options)

    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    expected = values_and_gradients(function, inputs, causal=True)
    actual = values_and_gradients(compiled, inputs, causal=True)
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-5, atol=1e-6, msg=name)
    with torch.no_grad():
        torch.testing.assert_close(run(compiled, inputs), run(function, inputs))
