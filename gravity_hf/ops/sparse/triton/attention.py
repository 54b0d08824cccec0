"""The two kernels of routed attention, started."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from ...triton.problem import interpreted
from ..scores import DotProduct, Score
from ..selecting import Selection
from .kernels import merge_kernel, tile_kernel
from .routes import TILE, device_tiles

_KEYS = 64


def routed_attention(q: Tensor, k: Tensor, v: Tensor, score: Score, selection: Selection) -> Tensor:
    """Forward only; shapes as in `sparse_attention`. Weights and parts are rounded to the dtype of
    v, as in every fused kernel; everything between is float32. Memory beside the output is that of
    the parts, `B H Tq N Dv`. Nothing waits for the device."""
    batch, heads, queries, width = q.shape
    key_heads, keys, width_v = v.shape[1:]
    groups, budget, seen = heads // key_heads, selection.budget, selection.visible
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    tiles = device_tiles(selection, groups)
    outputs = v.new_empty(tiles.block.shape[0] * TILE, width_v)
    highest, sums = (v.new_empty(outputs.shape[0], dtype=torch.float32) for _ in range(2))
    out = v.new_empty(batch, heads, queries, width_v)
    law = "dot" if isinstance(score, DotProduct) else score.law
    strength, softening, radius = _terms(q, score)
    first = seen.first.expand(batch, -1).to(torch.int32).contiguous()
    last = seen.last.expand(batch, queries).to(torch.int32).contiguous()
    allowed = seen.allowed
    allowed = None if allowed is None else allowed[:, 0].expand(batch, keys).contiguous().byte()
    origin = seen.origin
    origin = None if origin is None else origin.expand(batch).to(torch.int32).contiguous()
    blocks = -(-keys // budget.block_size)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    shared = {
        "GROUPS": groups,
        "WINDOW": budget.window,
        "SINKS": budget.sinks,
        "WIDTH": width,
        "WIDTH_V": width_v,
        "WIDTH_PAD": _padded(width),
        "WIDTH_V_PAD": _padded(width_v),
        "LAW": law,
        "LIFTED": radius is not None,
        "HAS_ALLOWED": allowed is not None,
        "NATIVE": not interpreted(),
        "TILE": TILE,
        "num_warps": 4,
    }
    tensors = (q, k, v, strength, softening, radius)
    parts = (outputs, highest, sums)
    with torch.cuda.device_of(q):
        tile_kernel[(tiles.block.shape[0],)](
            *tensors, tiles.rows, tiles.block, first, last, allowed, origin, *parts, *strides,
            queries, keys, blocks, batch * key_heads * blocks, key_heads, first.shape[1],
            SIZE=budget.block_size, HAS_ORIGIN=origin is not None,
            BLOCK_N=_padded(budget.block_size), **shared,
        )  # fmt: skip
        merge_kernel[(triton.cdiv(queries * groups, TILE), batch * key_heads)](
            *tensors, tiles.places, first, last, allowed, *parts, out, *strides, queries, keys,
            key_heads, first.shape[1], tiles.places.shape[3], BLOCK_N=_KEYS,
            BLOCK_S=_padded(budget.sinks), **shared,
        )  # fmt: skip
    return out


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
