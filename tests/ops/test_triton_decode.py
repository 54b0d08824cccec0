"""The kernel for few queries: in Triton's interpreter on a CPU, compiled on a GPU."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from helpers import assert_within_budget
from torch import Tensor

from gravity_hf.ops.reference import (
    gravity_attention_reference,
    gravity_score,
    split_mask,
    squared_distance,
)

from .operator_cases import FAMILIES, cast, make_inputs, padding_mask

pytest.importorskip("triton")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("Triton needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from gravity_hf.ops.triton.decode import (  # noqa: E402
    Tiling,
    choose_tiling,
    decode_attention,
    serves_decoding,
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SPLIT_THREE_WAYS = Tiling(splits=3, block_keys=16, warps=4, stages=2)


def decode(inputs: dict[str, Tensor], law: str, **options: Any) -> Tensor:
    """The kernel on arguments of the operator, moved to DEVICE as they are laid out."""
    x = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    options = {n: o.to(DEVICE) if isinstance(o, Tensor) else o for n, o in options.items()}
    key_term = x.get("key_mass")
    if key_term is not None and law == "power":
        key_term = key_term.log2()
    return decode_attention(
        x["q"], x["k"], x["v"], x["mass"].square(), x["eps"], law=law,
        key_radius_sq=x.get("key_radius_sq"), query_mass=x.get("query_mass"),
        key_term=key_term, **options,
    ).cpu()  # fmt: skip


def rounded_weights_peer(inputs: dict[str, Tensor], law: str, mask: Tensor | None) -> Tensor:
    """Plain float32 whose weights are rounded to the dtype of `v`, as all fused kernels do."""
    groups = inputs["q"].shape[1] // inputs["k"].shape[1]
    x = {name: tensor.float() for name, tensor in inputs.items()}
    k, v = (x[name].repeat_interleave(groups, 1) for name in ("k", "v"))
    radius = x.get("key_radius_sq")
    radius = None if radius is None else radius.repeat_interleave(groups)
    distance_sq = squared_distance(x["q"], k, radius)
    masses = x.get("query_mass"), x.get("key_mass")
    score = gravity_score(distance_sq, x["mass"], x["eps"], law, *masses)
    if mask is not None:
        allowed, bias = split_mask(mask)
        if bias is not None:
            score = score + bias.masked_fill(~allowed, 0.0).float()
        score = score.masked_fill(~allowed, float("-inf"))
    weights = (score - score.amax(-1, keepdim=True).nan_to_num(neginf=0.0)).exp()
    total = weights.sum(-1, keepdim=True).clamp(min=1e-30)
    rounded = weights.to(inputs["v"].dtype).float()
    return (rounded @ v / total).to(inputs["v"].dtype)


def check(
    inputs: dict[str, Tensor],
    law: str = "force",
    *,
    seen: Tensor | None = None,
    tiling: Tiling | None = SPLIT_THREE_WAYS,
    computed: int | None = None,
    **options: Any,
) -> Tensor:
    """The kernel with `options` against the reference with the mask `seen`.

    computed: how many entries of the batch the kernel gets. The others make the budget a property
    of the inputs' family: with few rows, the rounding of one pair decides how far off the peer is.
    """
    batched = ("q", "k", "v", "query_mass", "key_mass")
    part = {name: x[:computed] if name in batched else x for name, x in inputs.items()}
    actual = decode(part, law, tiling=tiling, **options)
    exact_inputs = {name: x.double() for name, x in inputs.items()}
    arguments = [exact_inputs.pop(name) for name in ("q", "k", "v", "mass")]
    exact = gravity_attention_reference(*arguments, law=law, mask=seen, **exact_inputs).output
    peer = rounded_weights_peer(inputs, law, seen)
    assert actual.dtype == inputs["v"].dtype
    everywhere = exact.to(actual.dtype)
    everywhere[:computed] = actual
    assert_within_budget("output", everywhere, exact, peer)
    return actual


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("law", ["force", "power"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_reference_within_the_budget(family, law, dtype):
    inputs = make_inputs(batch=16, queries=3, keys=41, width=16, law=law, family=family)
    check(cast(inputs, dtype), law, computed=1)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("law", ["force", "power"])
@pytest.mark.parametrize("lifted", [False, True], ids=["euclidean", "lifted"])
def test_token_masses_and_lifted_keys(lifted, law, dtype):
    inputs = make_inputs(batch=2, queries=2, keys=35, lifted=lifted, token_masses=True, law=law)
    check(cast(inputs, dtype), law)


@pytest.mark.parametrize("groups", [1, 4, 8])
@pytest.mark.parametrize("queries", [1, 3, 16])
def test_query_heads_share_the_keys_of_their_group(queries, groups):
    heads = 2 * groups
    if not serves_decoding(queries, heads, 2, 16):
        with pytest.raises(ValueError, match="rows per key head"):
            decode(make_inputs(queries=queries, heads=heads), "force")
        return
    inputs = make_inputs(batch=1, heads=heads, queries=queries, keys=37, width=16)
    check(cast(inputs, torch.float32), causal=True, seen=_causal(queries, 37))


@pytest.mark.parametrize(
    "width, value_width", [(16, 48), (80, 80), (96, 20), (256, 64), (5, 3)], ids=str
)
def test_any_width(width, value_width):
    inputs = make_inputs(batch=1, queries=1, keys=21, width=width, value_width=value_width)
    for dtype in (torch.float32, torch.float16):
        check(cast(inputs, dtype))


@pytest.mark.parametrize("splits", [1, 3, 19, 40], ids=lambda n: f"{n}-splits")
def test_splits_change_nothing_but_rounding(splits):
    """19 splits: more than one step of the merging kernel, and the nearest key is in the last."""
    inputs = make_inputs(batch=16, queries=2, keys=300, width=16)
    inputs["k"][:, :, -2:] = 0.7 * inputs["q"][:, ::2]
    inputs["mass"] *= 3
    inputs = cast(inputs, torch.float32)
    tiling = Tiling(splits, block_keys=16, warps=4, stages=2)
    first = check(inputs, tiling=tiling, computed=1)
    assert torch.equal(first, check(inputs, tiling=tiling, computed=1))


def _causal(queries: int, keys: int) -> Tensor:
    return torch.arange(keys) <= torch.arange(queries)[:, None] + (keys - queries)


def _masks() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(3)
    bias = torch.randn(2, 4, 3, 40, generator=g)
    bias[torch.rand(bias.shape, generator=g) < 0.3] = float("-inf")
    lowest = torch.zeros(2, 1, 1, 40, dtype=torch.bfloat16)
    lowest[1, ..., :9] = torch.finfo(torch.bfloat16).min
    return {
        "left padding": padding_mask(2, 40, "left"),
        "per head and row": torch.rand(2, 4, 3, 40, generator=g) < 0.5,
        "per row, two dimensions": torch.rand(3, 40, generator=g) < 0.5,
        "float bias with -inf": bias,
        "float, lowest value hides": lowest,
        "float64 bias": bias[:1, :1].double(),
        "whole blocks hidden": torch.arange(40) >= 33,
    }


@pytest.mark.parametrize("name", list(_masks()))
@pytest.mark.parametrize("law", ["force", "power"])
def test_masks(law, name):
    mask = _masks()[name]
    check(cast(make_inputs(queries=3, keys=40), torch.float32), law, mask=mask, seen=mask)


def test_mask_and_causality_combine():
    mask = padding_mask(2, 40, "left")
    inputs = cast(make_inputs(queries=3, keys=40), torch.bfloat16)
    check(inputs, mask=mask, causal=True, seen=mask & _causal(3, 40))


def poisoned(inputs: dict[str, Tensor], seen: Tensor) -> dict[str, Tensor]:
    """`inputs` with NaN in keys and values before the first and after the last that any row of
    their batch entry sees; `seen` `[B, 1, Tq, Tk]`."""
    used = seen.any(2).int()
    read = (used.cummax(-1).values & used.flip(-1).cummax(-1).values.flip(-1)).bool()
    hidden = {n: inputs[n].masked_fill(~read.unsqueeze(-1), float("nan")) for n in ("k", "v")}
    return cast({**inputs, **hidden}, torch.float32)


def check_unread(inputs: dict[str, Tensor], seen: Tensor, **options: Any) -> None:
    """NaN in what must not be read changes nothing."""
    clean = check(cast(inputs, torch.float32), seen=seen, **options)
    dirty = decode(poisoned(inputs, seen), "force", tiling=SPLIT_THREE_WAYS, **options)
    assert torch.equal(clean, dirty)


RANGES = {
    "left padding": [[[0, 50]], [[17, 50]]],
    "right padding": [[[0, 50]], [[0, 23]]],
    "static cache, one row": [[[0, 31]]],
    "static cache, causal rows": [[[0, 29], [0, 30], [0, 31]]],
    "rows of different documents": [[[0, 12], [12, 40], [12, 41]], [[3, 5], [4, 6], [20, 21]]],
}


@pytest.mark.parametrize("name", RANGES)
def test_keys_before_and_after_all_ranges_are_not_read(name):
    ranges = torch.tensor(RANGES[name], dtype=torch.int32)
    column = torch.arange(50)
    seen = (column >= ranges[..., :1]) & (column < ranges[..., 1:])
    seen = seen[:, None].expand(2, 1, 3, 50)
    inputs = make_inputs(queries=3, keys=50)
    check_unread(inputs, seen, key_ranges=ranges)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both-sides"])
@pytest.mark.parametrize("window", [1, 5, 30, 100])
def test_keys_outside_of_all_windows_are_not_read(window, causal):
    gap = torch.arange(3)[:, None] + 47 - torch.arange(50)
    seen = (gap >= 0) & (gap < window) if causal else gap.abs() < window
    inputs = make_inputs(queries=3, keys=50)
    check_unread(inputs, seen.expand(2, 1, 3, 50), window=window, causal=causal)


def test_a_row_that_sees_no_key_is_zero():
    inputs = make_inputs(queries=3, keys=20)
    ranges = torch.tensor([[[5, 5], [5, 9], [9, 20]], [[0, 0]] * 3], dtype=torch.int32)
    for tiling in (None, SPLIT_THREE_WAYS):
        output = decode(cast(inputs, torch.float32), "force", key_ranges=ranges, tiling=tiling)
        assert output[0, :, 0].eq(0).all() and output[1].eq(0).all()
        assert output[0, :, 1:].ne(0).all()
    hidden = torch.zeros(20, dtype=torch.bool)
    output = decode(cast(inputs, torch.float32), "force", mask=hidden)
    assert output.eq(0).all()


def test_more_queries_than_keys():
    inputs = cast(make_inputs(queries=7, keys=4), torch.float32)
    check(inputs, causal=True, seen=_causal(7, 4))


def test_caches_are_read_in_place_whatever_their_strides():
    inputs = cast(make_inputs(queries=1, keys=33, width=16), torch.bfloat16)
    expected = decode(inputs, "force", tiling=SPLIT_THREE_WAYS)
    time_before_heads = {n: inputs[n].transpose(1, 2).contiguous().transpose(1, 2) for n in "kv"}
    part_of_longer = {n: torch.cat([inputs[n]] * 3, 2)[:, :, 33:66] for n in "kv"}
    both_in_one = torch.stack([inputs["k"], inputs["v"]], -1).unbind(-1)
    for k, v in (time_before_heads.values(), part_of_longer.values(), both_in_one):
        assert not k.is_contiguous()
        strided = {**inputs, "k": k, "v": v}
        assert torch.equal(decode(strided, "force", tiling=SPLIT_THREE_WAYS), expected)


def test_nan_in_a_visible_key_shows():
    inputs = cast(make_inputs(queries=1, keys=20), torch.float32)
    inputs["k"][:, :, 7] = float("nan")
    assert decode(inputs, "force", tiling=SPLIT_THREE_WAYS).isnan().all()


def test_no_rows_no_kernel():
    inputs = cast(make_inputs(batch=0, queries=1), torch.float32)
    assert decode(inputs, "force").shape == (0, 4, 1, 6)


@pytest.mark.parametrize("width", [16, 64, 128, 256])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_the_chosen_tiling_serves(dtype, width):
    inputs = make_inputs(batch=1, heads=2, queries=1, keys=300, width=width)
    tiling = choose_tiling(1, 1, 300, width, width, dtype, torch.device(DEVICE))
    assert tiling.splits > 1
    check(cast(inputs, dtype), tiling=None)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("law", ["force", "power"])
@pytest.mark.parametrize("width", [64, 80, 128, 256])
@pytest.mark.parametrize("groups, queries", [(1, 1), (8, 1), (8, 8), (4, 16)])
def test_long_caches_with_the_chosen_tiling(groups, queries, width, law, dtype):
    inputs = make_inputs(heads=2 * groups, queries=queries, keys=4099, width=width, law=law)
    seen = _causal(queries, 4099)
    check(cast(inputs, dtype), law, causal=True, seen=seen, tiling=None)


@pytest.mark.gpu
def test_a_captured_step_follows_the_ranges_on_the_device():
    """CUDA graphs: nothing that lives on the device is read by the host."""
    inputs = cast(make_inputs(heads=16, queries=1, keys=2048, width=64), torch.bfloat16)
    x = {name: tensor.to(DEVICE) for name, tensor in inputs.items()}
    ranges = torch.tensor([[[0, 100]]], dtype=torch.int32, device=DEVICE)

    def step() -> Tensor:
        return decode_attention(
            x["q"], x["k"], x["v"], x["mass"].square(), x["eps"], law="force", key_ranges=ranges
        )

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = step()
    for stop in (1, 700, 2048):
        ranges[..., 1] = stop
        graph.replay()
        assert torch.equal(output, step())
