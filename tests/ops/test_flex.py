"""FlexAttention as an independent second opinion, and what it refuses."""

import pytest
import torch
from helpers import assert_within_budget
from ops.operator_cases import (
    BATCH_TERMS,
    FAMILIES,
    TERMS,
    cast,
    make_inputs,
    packed_ranges,
    padding_mask,
    padding_ranges,
    run,
)
from ops.position_cases import expanded, position_inputs
from torch.nn.attention.flex_attention import create_block_mask

from gravity_hf.ops import flex
from gravity_hf.ops.curvature import Curvature
from gravity_hf.ops.cutoff import Cutoff
from gravity_hf.ops.flex import gravity_attention_flex
from gravity_hf.ops.flex_blocks import block_mask
from gravity_hf.ops.reference import gravity_attention_reference

pytestmark = pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")


def check(inputs, dtype, **options):
    given = cast(inputs, dtype)
    exact_inputs = {name: x.double() for name, x in given.items()}
    exact = run(gravity_attention_reference, exact_inputs, **options)
    peer = run(gravity_attention_reference, given, **options)
    actual = run(gravity_attention_flex, given, **options)
    # The kernel keeps weights in the dtype of v; the reference keeps them in float32.
    factor = 2.0 if dtype == torch.float32 else 4.0
    assert_within_budget("output", actual, exact, peer, factor=factor)
    return actual


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("law", ["force", "power"])
def test_forward_within_budget(law, family):
    """F18: captured norms express gravity."""
    for lifted in (False, True):
        inputs = make_inputs(
            family=family, lifted=lifted, law=law, queries=33, keys=40, width=32, token_masses=True
        )
        check(inputs, torch.float32, law=law, causal=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_forward_within_budget_in_half_precision(dtype):
    check(make_inputs(queries=33, keys=40, width=32), dtype)


def test_masks_and_hidden_rows():
    inputs = make_inputs(queries=12, keys=20, width=16)
    mask = torch.randn(2, 1, 12, 20)
    mask[0, 0, 5] = torch.finfo(torch.float32).min
    assert (check(inputs, torch.float32, mask=mask)[0, :, 5] == 0).all()
    check(inputs, torch.float32, mask=padding_mask(2, 20, "left"), causal=True)
    check(inputs, torch.float32, mask=torch.rand(20) > 0.5)


def test_masses_by_their_logarithms():
    inputs = make_inputs(queries=12, keys=20, width=16, law="power", token_masses=True)
    expected = check(inputs, torch.float32, law="power")
    inputs["log_key_mass"] = inputs.pop("key_mass").log()
    torch.testing.assert_close(check(inputs, torch.float32, law="power"), expected)


def test_causal_rows_without_keys_give_zeros():
    output = check(make_inputs(queries=12, keys=9, width=16), torch.float32, causal=True)
    assert (output[:, :, :3] == 0).all()


@pytest.mark.parametrize("cap", ["clamp", "tanh"])
@pytest.mark.parametrize("kappa", [0.25, -0.1, 1.5])
def test_curved_positions_in_a_left_padded_batch(kappa, cap):
    ranges = padding_ranges(2, 40, "left")
    options = {"curvature": Curvature(kappa), "max_force": 3.0, "force_cap": cap}
    for dtype in (torch.float32, torch.bfloat16):
        check(position_inputs(queries=33), dtype, causal=True, key_ranges=ranges, **options)


@pytest.mark.parametrize("term", ["lgt", "table-power", "curved-power", *BATCH_TERMS])
def test_tables_and_curvature_under_both_laws(term):
    given, options = {**TERMS, **BATCH_TERMS}[term]
    options = {name: x for name, x in options.items() if name != "exclude_self"}
    given = {**given, "head_bias": False, "token_masses": True}
    law = given.get("law", "force")
    inputs = make_inputs(queries=33, keys=40, width=16, **given)
    check(inputs, torch.float32, law=law, causal=True, **options)


def test_expanded_positions_are_not_written_out(monkeypatch):
    seen, runner = [], flex._runner

    def watched(device_type):
        def run_and_tell(q, k, *rest):
            seen.extend([q.data_ptr(), k.data_ptr()])
            return runner(device_type)(q, k, *rest)

        return run_and_tell

    monkeypatch.setattr(flex, "_runner", watched)
    inputs = cast(position_inputs(), torch.float32)
    views = expanded(inputs)
    torch.testing.assert_close(
        run(gravity_attention_flex, views), run(gravity_attention_flex, inputs)
    )
    assert seen[:2] == [views["q"].data_ptr(), views["k"].data_ptr()]


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("kind", [None, "left", "right", "packed"])
def test_blocks_are_those_of_torch(kind, causal):
    """Which torch finds by writing out every pair."""
    queries, keys = (500, 500) if kind == "packed" else (300, 500)
    ranges = None
    if kind is not None:
        packed = kind == "packed"
        ranges = packed_ranges(130, 0, 1, 369) if packed else padding_ranges(2, keys, kind)
    if ranges is None and not causal:
        assert block_mask(queries, keys, causal, ranges, torch.device("cpu")) is None
        return
    actual = block_mask(queries, keys, causal, ranges, torch.device("cpu"))
    batch = 1 if ranges is None else ranges.shape[0]
    expected = create_block_mask(actual.mask_mod, batch, None, queries, keys, "cpu")
    assert actual.shape == expected.shape
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name


def test_leaves_that_require_grad_are_served_without_grad():
    inputs = cast(make_inputs(width=16), torch.float32)
    inputs["q"].requires_grad_()
    with torch.no_grad():
        output = run(gravity_attention_flex, inputs)
    assert not output.requires_grad


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mass": torch.ones(4, requires_grad=True)}, "under torch.no_grad"),
        (
            {"law": "power", "log_key_mass": torch.zeros(2, 4, 11, requires_grad=True)},
            "under torch.no_grad",
        ),
        ({"dropout_p": 0.1}, "dropout_p = 0, got 0.1"),
        ({name: make_inputs()[name] for name in "qkv"}, "got torch.float64"),
        ({"q": torch.ones(2, 4, 0, 6)}, "no empty dimension"),
        ({"head_bias": torch.ones(4)}, "no head_bias"),
        ({"repulsive": True}, "no repulsive"),
        ({"cutoff": Cutoff(torch.ones(4), "log")}, "no cutoff"),
        (
            {"inverse_distance": torch.ones(0, 11), "q": None, "k": None, "eps": None},
            r"no empty dimension, got v \(2, 2, 11, 6\), inverse_distance \(0, 11\)",
        ),
        ({"softcap": 5.0}, "no softcap"),
        ({"sinks": torch.ones(4)}, "no sinks"),
        ({"window": 3}, "no window"),
        ({"exclude_self": True}, "no exclude_self"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_refusals_say_what_to_do(changes, message):
    arguments = {**cast(make_inputs(), torch.float32), **changes}
    tensors = [arguments.pop(name) for name in ("q", "k", "v", "mass")]
    with pytest.raises(ValueError, match=message):
        gravity_attention_flex(*tensors, **arguments)


@pytest.mark.gpu
def test_compiled_forward_on_a_gpu():
    inputs = cast(make_inputs(queries=200, keys=200, width=64), torch.bfloat16)
    expected = run(gravity_attention_reference, {n: x.double() for n, x in inputs.items()})
    actual = run(gravity_attention_flex, {n: x.cuda() for n, x in inputs.items()})
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.gpu
def test_compiled_curvature_padding_and_tables_on_a_gpu():
    """Positions as views; curvatures of other values compile nothing anew."""
    inputs = cast(position_inputs(batch=2, queries=200, keys=200, width=64), torch.bfloat16)
    ranges = padding_ranges(2, 200, "left")
    for kappa in (0.25, 0.15, -0.1):
        options = {"curvature": Curvature(kappa), "max_force": 3.0, "causal": True}
        doubles = {n: x.double() for n, x in inputs.items()}
        expected = run(gravity_attention_reference, doubles, key_ranges=ranges, **options)
        views = expanded({n: x.cuda() for n, x in inputs.items()})
        actual = run(gravity_attention_flex, views, key_ranges=ranges.cuda(), **options)
        torch.testing.assert_close(actual.cpu().double(), expected, rtol=2e-2, atol=2e-2)
    given, options = BATCH_TERMS["batch"]
    given = {**given, "head_bias": False, "token_masses": True}
    table = cast(make_inputs(queries=200, keys=200, width=64, **given), torch.bfloat16)
    expected = run(
        gravity_attention_reference, {n: x.double() for n, x in table.items()}, **options
    )
    actual = run(gravity_attention_flex, {n: x.cuda() for n, x in table.items()}, **options)
    torch.testing.assert_close(actual.cpu().double(), expected, rtol=2e-2, atol=2e-2)


def test_more_shapes_than_dynamo_has_graphs_for_stay_compiled():
    """Beyond dynamo's limit a call would run unfused, with all scores in memory."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    limit = torch._dynamo.config.recompile_limit
    call = flex._many_graphs(torch.compile(lambda x: x * 2.0, backend=backend, dynamic=False))
    for width in range(1, limit + 5):
        assert call(torch.ones(width)).tolist() == [2.0] * width
    assert len(compiled) == limit + 4
    assert torch._dynamo.config.recompile_limit == limit
