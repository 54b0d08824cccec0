"""The kernels of routed attention, started: two for the output, four for the gradient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from ...triton.problem import interpreted
from ..masked import needs_gradient
from ..scores import DotProduct, Score
from ..selecting import Selection
from .gradient_kernels import (
    COUNT,
    Terms,
    block_gradient_kernel,
    key_gradient_kernel,
    query_gradient_kernel,
    sink_gradient_kernel,
)
from .kernels import merge_kernel, tile_kernel
from .launching import start
from .routes import TILE, DeviceTiles, device_tiles

# Keys of a program, tiles of rows that a program for sinks takes, and those it looks through.
_KEYS, _SHARE, _TILES = 32, 8, 512


@dataclass(frozen=True, eq=False)
class Call:
    """What the kernels are told beside vectors and terms. first `[B, T]`, last `[B, Tq]`, origin
    `[B]`: int32. allowed: bytes `[B, Tk]`. Nothing here has a gradient."""

    law: str
    selection: Selection
    tiles: DeviceTiles
    first: Tensor
    last: Tensor
    allowed: Tensor | None
    origin: Tensor | None

    @property
    def blocks(self) -> int:
        """To a batch row and key head."""
        return -(-self.selection.visible.keys // self.selection.budget.block_size)

    def constants(self, q: Tensor, v: Tensor, radius: Tensor | None) -> dict[str, Any]:
        """Of all kernels."""
        budget = self.selection.budget
        return {
            "GROUPS": q.shape[1] // v.shape[1],
            "WINDOW": budget.window,
            "SINKS": budget.sinks,
            "DENSE": budget.dense_length,
            "WIDTH": q.shape[3],
            "WIDTH_V": v.shape[3],
            "WIDTH_PAD": _padded(q.shape[3]),
            "WIDTH_V_PAD": _padded(v.shape[3]),
            "LAW": self.law,
            "LIFTED": radius is not None,
            "NATIVE": not interpreted(),
            "TILE": TILE,
            "num_warps": 4,
        }

    def named(self, tensors: tuple[Tensor | None, ...]) -> dict[str, Tensor | None]:
        """What all kernels read."""
        names = ("q", "k", "v", "strength", "softening", "radius")
        named = dict(zip(names, tensors, strict=True))
        return {**named, "first": self.first, "last": self.last, "allowed": self.allowed}

    def numbers(self, tensors: tuple[Tensor, ...]) -> dict[str, int]:
        """Of all kernels."""
        q, _, v = tensors[:3]
        strides = {
            f"stride_{name}{dim}": x.stride(place)
            for name, x in zip("qkv", tensors[:3], strict=True)
            for place, dim in enumerate("bht")
        }
        sizes = {"queries": q.shape[2], "keys": v.shape[2], "key_heads": v.shape[1]}
        return {**strides, **sizes, "first_rows": self.first.shape[1]}


def routed_attention(q: Tensor, k: Tensor, v: Tensor, score: Score, selection: Selection) -> Tensor:
    """Shapes as in `sparse_attention`; first derivatives for q, k, v and the score's tensors.

    Weights and parts are rounded to the dtype of v, as in every fused kernel; everything between is
    float32, and so are all sums of a gradient. Memory beside the output is that of the parts,
    `B H Tq N Dv`. Nothing waits for the device.
    """
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    strength, softening, radius = _terms(q, score)
    law = "dot" if isinstance(score, DotProduct) else score.law
    call = _call(law, selection, q.shape[0], q.shape[1] // v.shape[1])
    tensors = (q, k, v, strength, softening, radius)
    if needs_gradient(q, k, v, score):
        return _Routed.apply(*tensors, call)
    return _forward(tensors, call, None)


def _call(law: str, selection: Selection, batch: int, groups: int) -> Call:
    seen = selection.visible
    first, last, origin = seen.as_int32(batch)
    allowed = seen.allowed
    if allowed is not None:
        allowed = allowed[:, 0].expand(batch, seen.keys).contiguous().byte()
    tiles = device_tiles(selection, first, last, groups)
    return Call(law, selection, tiles, first, last, allowed, origin)


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, strength, softening, radius, call):
        log_sums = q.new_empty(q.shape[:3], dtype=torch.float32)
        out = _forward((q, k, v, strength, softening, radius), call, log_sums)
        ctx.save_for_backward(q, k, v, strength, softening, radius, out, log_sums)
        ctx.call = call
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        *tensors, out, log_sums = ctx.saved_tensors
        return (*_backward(tuple(tensors), ctx.call, out, log_sums, grad), None)


def _forward(tensors: tuple, call: Call, log_sums: Tensor | None) -> Tensor:
    q, _, v, _, _, radius = tensors
    batch, heads, queries, _ = q.shape
    key_heads, _, width_v = v.shape[1:]
    budget, tiles = call.selection.budget, call.tiles
    outputs = v.new_empty(tiles.block.shape[0] * TILE, width_v)
    highest, sums = (v.new_empty(outputs.shape[0], dtype=torch.float32) for _ in range(2))
    out = v.new_empty(batch, heads, queries, width_v)
    shared, numbers = call.constants(q, v, radius), call.numbers(tensors)
    parts = {"outputs": outputs, "highest": highest, "sums": sums}
    with torch.cuda.device_of(q):
        if outputs.shape[0] > 0:
            start(
                tile_kernel, (tiles.block.shape[0],),
                {**call.named(tensors), "rows_of": tiles.rows, "block_of": tiles.block,
                 "edges": tiles.edges, "origin": call.origin, **parts},
                {**numbers, "blocks": call.blocks, "every": batch * key_heads * call.blocks},
                {**shared, "SIZE": budget.block_size, "BLOCK_N": _padded(budget.block_size)},
            )  # fmt: skip
        start(
            merge_kernel, (triton.cdiv(queries * (heads // key_heads), TILE), batch * key_heads),
            {**call.named(tensors), "places": tiles.places, **parts, "out": out,
             "log_sums": log_sums},
            {**numbers, "choices": tiles.places.shape[3]},
            {**shared, "BLOCK_N": _KEYS, "BLOCK_S": _padded(budget.sinks)},
        )  # fmt: skip
    return out


def _backward(
    tensors: tuple, call: Call, out: Tensor, log_sums: Tensor, grad: Tensor
) -> tuple[Tensor | None, ...]:
    """Of the six tensors."""
    q, k, v, _, _, radius = tensors
    batch, heads, queries, width = q.shape
    key_heads, keys, width_v = v.shape[1:]
    groups, budget, tiles = heads // key_heads, call.selection.budget, call.tiles
    single = {"dtype": torch.float32, "device": q.device}
    grad = grad.contiguous()
    shift = (grad.float() * out.float()).sum(-1)
    given = {**call.named(tensors), "grad": grad, "log_sums": log_sums, "shifts": shift}
    places = tiles.block.shape[0] * TILE
    part_q, part_terms = (torch.empty(places, size, **single) for size in (width, COUNT))
    grad_q, terms = (torch.empty(*q.shape[:3], size, **single) for size in (width, COUNT))
    # Where keys before the first block are in no block.
    new = torch.empty if call.origin is None else torch.zeros
    grad_k = new(batch, key_heads, keys, width, **single)
    grad_v = new(batch, key_heads, keys, width_v, **single)
    shared, numbers = call.constants(q, v, radius), call.numbers(tensors)
    shared |= {"COUNT": COUNT, "BLOCK_S": _padded(budget.sinks), "BLOCK_N": _KEYS}
    ends = _ends(call, groups)
    parts = {"part_q": part_q, "part_terms": part_terms}
    of_keys = {"grad_k": grad_k, "grad_v": grad_v}
    with torch.cuda.device_of(q):
        start(
            block_gradient_kernel, (batch * key_heads * call.blocks,),
            {**given, "rows_of": tiles.rows, "edges": tiles.edges, "origin": call.origin, **parts,
             **of_keys},
            {**numbers, "blocks": call.blocks},
            {**shared, "SIZE": budget.block_size, "BLOCK_N": _padded(budget.block_size)},
        )  # fmt: skip
        start(
            query_gradient_kernel, (triton.cdiv(queries * groups, TILE), batch * key_heads),
            {**given, "places": tiles.places, **parts, "grad_q": grad_q, "terms": terms},
            {**numbers, "choices": tiles.places.shape[3]}, shared,
        )  # fmt: skip
        sunk = _of_sinks(q, v, call, given, numbers, shared)
        start(
            key_gradient_kernel, (triton.cdiv(keys, _KEYS), batch * key_heads),
            {**given, "ends": ends, **sunk, **of_keys},
            {**numbers, "row_tiles": ends.shape[2], "all_tiles": batch * ends.shape[2]},
            {**shared, "TILES": _TILES},
        )  # fmt: skip
    vectors = (grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype))
    if call.law == "dot":
        return (*vectors, None, None, None)
    by_row = Terms(*terms.unbind(-1)[: len(Terms._fields)]).mended(shift)
    of_strength, of_softening, of_radius = (x.sum((0, 2)) for x in by_row)
    of_radius = None if radius is None else of_radius.view(key_heads, groups).sum(1)
    return (*vectors, of_strength, of_softening, of_radius)


def _of_sinks(
    q: Tensor,
    v: Tensor,
    call: Call,
    given: dict[str, Tensor | None],
    numbers: dict[str, int],
    shared: dict[str, Any],
) -> dict[str, Tensor | None]:
    """Gradients of the first keys `[B, G, BLOCK_S, D]` and values as sinks, where all rows of a
    batch row have the same: every row adds to them, too many for one program."""
    sinks = call.selection.budget.sinks
    if call.first.shape[1] > 1 or sinks == 0:
        return {"sunk_k": None, "sunk_v": None}
    batch, heads, queries, width = q.shape
    key_heads, _, width_v = v.shape[1:]
    tiles = triton.cdiv(queries * (heads // key_heads), TILE)
    shares, size = triton.cdiv(tiles, _SHARE), _padded(sinks)
    sunk = {
        name: torch.empty(shares, batch, key_heads, size, w, dtype=torch.float32, device=q.device)
        for name, w in (("sunk_k", width), ("sunk_v", width_v))
    }
    start(
        sink_gradient_kernel, (shares, batch * key_heads), {**given, **sunk},
        {**numbers, "row_tiles": tiles}, {**shared, "SHARE": _SHARE},
    )  # fmt: skip
    return {name: x.sum(0) for name, x in sunk.items()}


def _ends(call: Call, groups: int) -> Tensor:
    """Int32 `[4, B, tiles]`: of `TILE` rows each the lowest and the highest key of their windows,
    and of their sinks; none where nobody sees anything."""
    budget, keys = call.selection.budget, call.selection.visible.keys
    last = call.last
    first = call.first.expand(last.shape)
    nothing = last < 0
    low = torch.maximum(first, last - budget.window + 1)
    low = torch.where(last - first < budget.dense_length, first, low)
    sinks = torch.minimum(first + budget.sinks - 1, low - 1)
    low = low.masked_fill(nothing, keys)
    tops = (last, sinks.masked_fill(nothing, -1))
    missing = -last.shape[1] * groups % TILE

    def tiled(x: Tensor, empty: int) -> Tensor:
        rows = torch.nn.functional.pad(x.repeat_interleave(groups, 1), (0, missing), value=empty)
        return rows.unflatten(1, (-1, TILE))

    lows = [tiled(x, keys).amin(2) for x in (low, first.masked_fill(nothing, keys))]
    highs = [tiled(x, -1).amax(2) for x in tops]
    return torch.stack([lows[0], highs[0], lows[1], highs[1]]).to(torch.int32).contiguous()


def _terms(q: Tensor, score: Score) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """In float32: `[H]`, `[H]`, `[G]`."""
    if isinstance(score, DotProduct):
        scaling = torch.full((q.shape[1],), score.scaling, dtype=torch.float32, device=q.device)
        return scaling, None, None
    radius = None if score.key_radius_sq is None else score.key_radius_sq.float().contiguous()
    return score.mass.float().square(), score.softening.float().contiguous(), radius


def _padded(length: int) -> int:
    """What a product takes: a power of two, 16 at least."""
    return max(16, triton.next_power_of_2(length))
