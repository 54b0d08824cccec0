"""The Triton kernels on positions: curved distances, both caps, tables, and nothing written out."""

from __future__ import annotations

import pytest
import torch
from helpers import assert_within_budget
from ops.operator_cases import BATCH_TERMS, cast, make_inputs, padding_ranges, run
from ops.position_cases import expanded, position_inputs
from ops.triton_cases import DEVICE, check, check_budgets, kernel_results, moved, require_kernels

from gravity_hf.ops import gravity_attention
from gravity_hf.ops.curvature import Curvature
from gravity_hf.ops.reference import gravity_attention_reference
from gravity_hf.ops.triton import gravity_attention_triton

require_kernels()

from gravity_hf.ops.triton import decode  # noqa: E402
from gravity_hf.ops.triton.problem import Problem  # noqa: E402

PADDED = padding_ranges(2, 40, "left")
RULES = [
    # kappa, cap, key ranges, a softening, the size of positions
    (0.25, "clamp", None, 0.2, 0.02),
    (0.15, "tanh", PADDED, 0.2, 0.02),
    (-0.1, "clamp", PADDED, 0.05, 0.3),
    (1.5, "tanh", None, 0.2, 0.02),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule[0]}-{rule[1]}")
def test_curved_positions_stay_in_the_error_budget(rule, dtype):
    """Output and all gradients, on the inputs as rounded."""
    kappa, cap, ranges, softening, size = rule
    cases = [position_inputs(softening=softening, size=size, seed=seed) for seed in range(2)]
    options = {"curvature": Curvature(kappa), "max_force": 3.0, "force_cap": cap}
    if ranges is not None:
        options["key_ranges"] = ranges
    check_budgets(dtype, cases, law="force", causal=True, **options)


def test_distances_beyond_the_horizon_of_a_strong_curvature():
    """Where the bent distance falls to the horizon and below, the floor holds and has no slope."""
    inputs = position_inputs(width=8, size=1.0, softening=0.5)
    distances = torch.cdist(inputs["k"][0, 0], inputs["k"][0, 0])
    floored = 1 + 1.5 * torch.cos(distances) < 0
    assert 0.1 < floored.double().mean() < 0.9
    check(inputs, curvature=Curvature(1.5), max_force=2.0, force_cap="tanh")
    power = {name: x for name, x in inputs.items() if name != "query_mass"}
    check(power, law="power", curvature=Curvature(1.5), causal=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("queries", [40, 1], ids=["forward", "decode"])
def test_a_token_is_at_no_distance_from_itself(queries, dtype):
    """Without softening its force is `m^2` over the horizon, a million; what rounding leaves of its
    distance must be less than the horizon, or the force would be something else."""
    inputs = cast(position_inputs(queries=queries, width=128, softening=0.0, seed=3), dtype)
    inputs["query_mass"], inputs["key_mass"] = inputs["query_mass"] / 50, inputs["key_mass"] / 50
    options = {"curvature": Curvature(0.15), "causal": True}
    doubles = {name: x.double() for name, x in inputs.items()}
    exact = run(gravity_attention_reference, doubles, **options)
    peer = run(gravity_attention_reference, inputs, **options)
    with torch.no_grad():
        actual = run(gravity_attention_triton, moved(inputs), **options).cpu()
    factor = 2.0 if dtype == torch.float32 else 4.0
    assert_within_budget("output", actual, exact, peer, factor=factor)
    with torch.no_grad():
        capped = run(gravity_attention_triton, moved(inputs), max_force=50.0, **options).cpu()
    expected = run(gravity_attention_reference, doubles, max_force=50.0, **options)
    torch.testing.assert_close(capped.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("shared", ["both", "heads", "batch"])
def test_expanded_positions_are_read_in_place(shared):
    """The same bits as for copies, without a copy; and a gradient for what was expanded."""
    inputs = moved(cast(position_inputs(batch=2, heads=2, width=16), torch.bfloat16))
    parts = {"both": (1, 1), "heads": (2, 1), "batch": (1, 2)}[shared]
    leaf = inputs["k"][: parts[0], : parts[1]].contiguous().requires_grad_()
    options = {"curvature": Curvature(0.15), "max_force": 3.0, "causal": True}

    def gradient(copied):
        k = leaf.expand(2, 2, 40, 16)
        k = k.contiguous() if copied else k
        output = run(gravity_attention_triton, {**inputs, "q": k, "k": k}, **options)
        return output, torch.autograd.grad(output.sum(), leaf)[0]

    for actual, expected in zip(gradient(False), gradient(True), strict=True):
        assert torch.equal(actual, expected)
    k = leaf.detach().expand(2, 2, 40, 16)
    absent = dict.fromkeys(Problem.__dataclass_fields__)
    tensors = {"q": k, "k": k, "v": inputs["v"], "strength": inputs["mass"]}
    numbers = {"law": "force", "window": 0, "dropout_p": 0.0, "max_force": float("inf")}
    q_read, k_read = Problem(**{**absent, **tensors, **numbers}).queries_and_keys()
    assert q_read.data_ptr() == k_read.data_ptr() == leaf.data_ptr()
    assert k_read.shape == leaf.shape


@pytest.mark.parametrize("cap", ["clamp", "tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_few_queries_on_curved_positions(dtype, cap, monkeypatch):
    """The decoding kernel serves them: a generated token reads its cache once."""
    calls, kernel = [], decode.decode_attention

    def watched(*tensors, **options):
        calls.append(options["kappa"])
        tiling = decode.Tiling(splits=3, block_keys=16, warps=4, stages=2)
        return kernel(*tensors, **options, tiling=tiling)

    monkeypatch.setattr("gravity_hf.ops.triton.op.decode_attention", watched)
    inputs = cast(position_inputs(queries=2, keys=70, width=16), dtype)
    ranges = padding_ranges(2, 70, "left")
    options = {"curvature": Curvature(0.25), "max_force": 3.0, "force_cap": cap, "causal": True}
    doubles = {name: x.double() for name, x in inputs.items()}
    exact = run(gravity_attention_reference, doubles, key_ranges=ranges, **options)
    peer = run(gravity_attention_reference, inputs, key_ranges=ranges, **options)
    with torch.no_grad():
        views = expanded(moved(inputs))
        actual = run(gravity_attention_triton, views, key_ranges=ranges.to(DEVICE), **options)
    factor = 2.0 if dtype == torch.float32 else 4.0
    assert_within_budget("output", actual.cpu(), exact, peer, factor=factor)
    assert calls == [0.25]


@pytest.mark.parametrize("term", BATCH_TERMS)
def test_a_table_for_each_batch_entry(term):
    given, options = BATCH_TERMS[term]
    law = given.get("law", "force")
    inputs = make_inputs(queries=40, keys=50, value_width=5, heads=2, token_masses=True, **given)
    check(inputs, law=law, causal=True, **options)


def test_a_cap_of_tanh_is_exact_for_small_forces():
    """They would drown in the rounding of `1 - exp(-2x)`: weights relative to 1000 keys show it."""
    inputs = position_inputs(batch=1, heads=1, keys=40, width=16, size=1.0, masses=False)
    inputs["mass"] = inputs["mass"] * 0.1
    given = cast(inputs, torch.float32)
    results = kernel_results(given, max_force=50.0, force_cap="tanh")
    plain = {name: x.double() for name, x in given.items()}
    expected = run(gravity_attention_reference, plain, max_force=50.0, force_cap="tanh")
    error = (results["output"].double() - expected).abs().max()
    assert error < 4e-7, f"{error:.1e}"


def test_compiled_positions_equal_eager_ones():
    """Without a break, the gradient of a view included."""
    inputs = moved(cast(position_inputs(queries=20, keys=20, width=16), torch.float32))
    leaf = inputs["k"][:1, :1].contiguous().requires_grad_()

    def step(function):
        k = leaf.expand(2, 2, 20, 16)
        terms = {name: inputs[name] for name in ("eps", "query_mass", "key_mass")}
        output = function(k, k, inputs["v"], inputs["mass"], **terms)
        return output, torch.autograd.grad(output.sum(), leaf)[0]

    def attend(*tensors, **terms):
        rules = {"curvature": Curvature(0.15), "max_force": 3.0, "force_cap": "tanh"}
        return gravity_attention(*tensors, **terms, **rules, causal=True, impl="triton")

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(step(compiled), step(attend), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("function", ["square_root", "cosine", "sine"])
def test_approximations_for_curvature_stay_in_their_budget(function):
    """Against float64: the root within 2 units in the last place; cosine and sine within 2^-20 up
    to 2 pi, and beyond within 2^-22 of the argument."""
    from ops.special_functions import evaluate

    x = torch.exp((torch.rand(2**16, generator=torch.Generator().manual_seed(0)) - 0.7) * 16)
    exact = {"square_root": torch.sqrt, "cosine": torch.cos, "sine": torch.sin}[function]
    expected = exact(x.double())
    error = (evaluate(function, x.cuda()).cpu().double() - expected).abs()
    if function == "square_root":
        assert (error / expected).max() < 2 * 2**-23
    else:
        assert (error / (2**-20 + x.double() * 2**-22)).max() < 1
