"""The Triton kernels as NGT calls them: float32 coordinates beside values in half precision, token
masses, the token itself excluded, a hard cutoff that skips tiles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ops.operator_cases import make_inputs, packed_ranges, run, values_and_gradients
from ops.triton_cases import DEVICE, kernel_results, moved, require_kernels
from torch import Tensor

from gravity_hf.ops.reference import gravity_attention_reference
from gravity_hf.ops.triton import gravity_attention_triton

require_kernels()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from gravity_hf.ops.triton import reach, tiles  # noqa: E402
from gravity_hf.ops.triton.problem import aligned  # noqa: E402
from gravity_hf.ops.triton.score import thirds  # noqa: E402

# Of the largest element: what rounding of weights and gradients to the dtype of values may do.
TOLERANCE = {torch.bfloat16: 0.03, torch.float16: 0.01}
CALLS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "v2": ({"law": "power"}, {"law": "power", "exclude_self": True}),
    "reference": (
        {"radius": True, "head_bias": True},
        {"cutoff": "hard", "repulsive": True},
    ),
    "soft": ({"radius": True, "head_bias": True}, {"cutoff": "soft", "repulsive": True}),
    "log": ({"law": "power", "radius": True}, {"law": "power", "cutoff": "log"}),
}
SHAPE = {"batch": 1, "heads": 2, "key_heads": 2, "width": 16, "value_width": 32}


def mixed(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: x.to(dtype) if name == "v" else x.float() for name, x in inputs.items()}


def compare(given: dict[str, Any], tolerance: float, **options: Any) -> None:
    doubles = {name: x.double() for name, x in given.items()}
    expected = values_and_gradients(gravity_attention_reference, doubles, **options)
    actual = kernel_results(given, **options)
    for name, value in expected.items():
        assert actual[name].dtype == (given["v"] if name == "output" else given[name]).dtype, name
        error = (actual[name].double() - value).abs().max() / value.abs().max().clamp(min=0.1)
        assert error < tolerance, f"{name}: relative error {error:.1e}"


# float16 has code of its own, in the plain and in the general law, but none for a kind of cutoff.
HALF = [(call, torch.bfloat16) for call in CALLS]
HALF += [(call, torch.float16) for call in ("v2", "reference")]


@pytest.mark.parametrize(("call", "dtype"), HALF, ids=str)
def test_float32_coordinates_beside_half_values(call, dtype):
    terms, options = CALLS[call]
    inputs = make_inputs(queries=36, keys=36, token_masses=True, **SHAPE, **terms)
    # Documents: their first tokens see nothing but themselves.
    ranges = packed_ranges(9, 0, 1, 26)
    compare(mixed(inputs, dtype), TOLERANCE[dtype], causal=True, key_ranges=ranges, **options)


def test_distances_far_from_the_origin_are_those_of_float32():
    """bfloat16 coordinates would be off by 0.1 each, and TF32's product by 2 in a distance."""
    inputs = make_inputs(queries=36, keys=36, law="power", **SHAPE)
    for name in "qk":
        inputs[name] = inputs[name] + 30.0
    compare(mixed(inputs, torch.bfloat16), 0.03, law="power")


@triton.jit
def _thirds_kernel(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    high, middle, low = thirds(tl.load(x + at))
    tl.store(out + at, high.to(tl.float32))
    tl.store(out + BLOCK + at, middle.to(tl.float32))
    tl.store(out + 2 * BLOCK + at, low.to(tl.float32))


def test_three_bfloat16_hold_every_bit_of_float32():
    x = torch.randn(64) * 10.0 ** torch.linspace(-12, 12, 64)
    parts = torch.empty(3, 64, device=DEVICE)
    _thirds_kernel[(1,)](x.to(DEVICE), parts, BLOCK=64)
    assert torch.equal(parts.cpu().double().sum(0), x.double())
    assert torch.equal(parts.bfloat16().float(), parts)


def test_the_logarithm_of_masses_may_be_given_instead():
    given = mixed(make_inputs(queries=12, keys=12, **SHAPE), torch.bfloat16)
    mass = torch.rand(1, 2, 12) + 0.1
    with torch.no_grad():
        expected, actual = (
            run(gravity_attention_triton, moved({**given, **masses}), law="power")
            for masses in ({"key_mass": mass}, {"log_key_mass": mass.log()})
        )
    torch.testing.assert_close(actual, expected, rtol=0.01, atol=0.01)


def test_a_view_of_all_heads_is_read_in_place():
    c = torch.randn(2, 12, 3, 16).transpose(1, 2)
    assert aligned(c) is c


def test_a_compiled_call_is_one_graph():
    terms, options = CALLS["v2"]
    given = moved(mixed(make_inputs(queries=20, keys=20, **SHAPE, **terms), torch.bfloat16))

    def call(*tensors: Tensor, **rest: Any) -> Tensor:
        return gravity_attention_triton(*tensors, **rest, causal=True)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    expected = values_and_gradients(call, given, **options)
    for name, value in values_and_gradients(compiled, given, **options).items():
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("call", CALLS)
def test_a_cache_is_decoded(call, queries):
    terms, options = CALLS[call]
    inputs = make_inputs(queries=queries, keys=41, token_masses=True, **SHAPE, **terms)
    given = mixed(inputs, torch.bfloat16)
    doubles = {name: x.double() for name, x in given.items()}
    with torch.no_grad():
        expected = run(gravity_attention_reference, doubles, causal=True, **options)
        actual = run(gravity_attention_triton, moved(given), causal=True, **options)
    error = (actual.cpu().double() - expected).abs().max() / expected.abs().max()
    assert error < 0.01


def test_dropout_is_even_over_rows_columns_and_neighbours():
    size, p = 128, 0.25
    given = {"q": torch.zeros(1, 1, size, 16), "v": torch.eye(size)[None, None]}
    given |= {"k": given["q"], "mass": torch.ones(1), "eps": torch.ones(1)}
    with torch.no_grad():
        weights = run(gravity_attention_triton, moved(given), dropout_p=p)[0, 0].cpu()
    dropped = (weights == 0).double()
    deviation = (p * (1 - p)) ** 0.5
    for dimension in (0, 1):
        shares = dropped.mean(dimension)
        assert ((shares - p).abs() < 5 * deviation / size**0.5).all()
        # 8 apart: those two columns share what is drawn.
        for step in (1, 8, 64):
            moved_on = dropped.roll(step, dimension)
            correlation = ((dropped - p) * (moved_on - p)).mean() / deviation**2
            assert correlation.abs() < 5 / size, (dimension, step)


def test_a_dropout_just_below_1_drops():
    """The 16 bits that decide once ran over, and nothing was dropped."""
    given = {"q": torch.zeros(1, 1, 16, 16), "v": torch.eye(16)[None, None]}
    given |= {"k": given["q"], "mass": torch.ones(1), "eps": torch.ones(1)}
    with torch.no_grad():
        weights = run(gravity_attention_triton, moved(given), dropout_p=1 - 2.0**-20)
    assert (weights == 0).double().mean() > 0.9


def test_a_key_that_is_no_number_is_not_hidden_by_a_radius():
    given = mixed(make_inputs(queries=20, keys=20, radius=True, **SHAPE), torch.bfloat16)
    given["k"][0, 0, 3, 0] = float("nan")
    with torch.no_grad():
        output = run(gravity_attention_triton, moved(given), cutoff="hard", causal=True)
    assert output[0, 0, 17:].isnan().all()


def long_path(length: int, value_width: int = 32) -> dict[str, Any]:
    """Tokens along a line: far in the sequence is far in space."""
    shape = {**SHAPE, "heads": 1, "key_heads": 1, "value_width": value_width}
    inputs = make_inputs(queries=length, keys=length, law="power", **shape, radius=True)
    inputs["radius"] = torch.tensor([2.5], dtype=torch.float64)
    place = torch.arange(length, dtype=torch.float64)[:, None] / 20
    for name in "qk":
        inputs[name] = 0.3 * inputs[name] + place
    return mixed(inputs, torch.bfloat16)


@pytest.mark.parametrize("value_width", [32, 64])
def test_skipping_tiles_out_of_reach_changes_nothing(monkeypatch, value_width):
    """Every run of the kernels gives the same bits, so those of skipping must be these. On a GPU
    kernels that skip are compiled anew, and nothing says that they round alike."""
    given = long_path(80, value_width)
    # The last tile of queries is out of reach of the first keys, and of nothing else.
    for name in "qk":
        given[name][:, :, 64:] += 2.0
    q, k, radius = (given[name].to(DEVICE) for name in ("q", "k", "radius"))
    _, counts = reach.lists_of(q, k, radius, 64, 32, causal=True)
    assert counts.flatten().tolist() == [2, 1]
    options = {"law": "power", "cutoff": "hard", "causal": True}
    expected = kernel_results(given, **options)
    monkeypatch.setattr(reach, "LEAST_KEYS", 0)
    for name, value in kernel_results(given, **options).items():
        if DEVICE == "cpu":
            assert torch.equal(value, expected[name]), name
        else:
            error = (value - expected[name]).abs().max() / expected[name].abs().max()
            assert error < TOLERANCE[torch.bfloat16], f"{name}: relative error {error:.1e}"


@pytest.mark.parametrize("by_key", [False, True], ids=["of_keys", "of_queries"])
def test_lists_hold_every_tile_with_a_visible_pair(by_key):
    given = long_path(300)
    q, k, radius = (given[name].to(DEVICE) for name in ("q", "k", "radius"))
    order, counts = reach.lists_of(q, k, radius, 32, 64, causal=True, window=200, by_key=by_key)
    listed = torch.zeros(order.shape, dtype=torch.bool)
    for place in counts.cpu().flatten().nonzero().flatten().tolist():
        entries = order.cpu().flatten(0, 2)[place, : counts.cpu().flatten()[place]]
        listed.flatten(0, 2)[place, entries.long()] = True
    i, j = torch.arange(300)[:, None], torch.arange(300)
    seen = (torch.cdist(q, k) <= radius[:, None, None]).cpu() & (j <= i) & (i - j < 200)
    seen = torch.nn.functional.pad(seen, (0, 20, 0, 20))
    tiles = seen.unflatten(2, (10, 32)).unflatten(4, (5, 64)).any(3).any(-1)
    if by_key:
        tiles = tiles.mT
    assert not (tiles & ~listed).any()
    assert listed.sum() < listed.numel() / 2


@pytest.mark.parametrize("values", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("vectors", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [16, 32, 64, 128, 256])
def test_no_tile_has_as_many_keys_as_values_are_wide_where_a_compiler_errs(values, vectors, width):
    """See `forward_tiles`: float32 vectors beside values in half precision, where tiles can be
    skipped."""
    widths = tiles.Widths(vectors, values, width, width)
    found = tiles.forward_tiles(widths, False, torch.device("cpu"))
    if widths.mixed and vectors == torch.float32:
        assert found["BLOCK_N"] != width or found["BLOCK_M"] < 64
    # Products of four warps take 64 rows; what is smaller is multiplied in another way.
    assert found["num_warps"] == 4
