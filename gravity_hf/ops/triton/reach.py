"""Which tiles a hard cutoff leaves: for a tile of queries those of keys in reach, or the reverse.

The bound is that of `../reach.py`: two tiles are out of reach where the spheres round them are
further apart than the radius, by more than what rounding can do to a distance. Kernels then go over
a list of tiles; what is not in it is not read.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .problem import Problem, block_of
from .vectors import vectors_row
from .visible import key_span, query_span

# Fewer keys than this take less time than making the lists does.
LEAST_KEYS = 2048
_CHUNK = 64


# fmt: off
@triton.jit
def spheres_kernel(
    x, centres, sizes, length, blocks, heads, stride_b, stride_h, stride_row, width,
    BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):
    """Of one tile of vectors: the middle of its extremes, the largest distance from that and the
    largest length."""
    row = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    batch, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    rows = block * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    at = x + batch * stride_b + head * stride_h + rows[:, None].to(tl.int64) * stride_row
    inside = (rows[:, None] < length) & (columns[None, :] < width)
    value = tl.load(at + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    lowest = tl.min(tl.where(inside, value, float("inf")), 0)
    highest = tl.max(tl.where(inside, value, -float("inf")), 0)
    centre = tl.where(columns < width, 0.5 * (lowest + highest), 0.0)
    away = tl.where(inside, value - centre[None, :], 0.0)
    away_sq, length_sq = tl.sum(away * away, 1), tl.sum(value * value, 1)
    # What is no number is in everybody's reach.
    away_sq = tl.where(away_sq == away_sq, away_sq, float("inf"))
    tile = tl.program_id(0).to(tl.int64)
    tl.store(centres + tile * BLOCK_D + columns, centre)
    tl.store(sizes + 2 * tile, tl.sqrt(tl.max(away_sq, 0)))
    tl.store(sizes + 2 * tile + 1, tl.sqrt(tl.max(length_sq, 0)))


@triton.jit
def reach_kernel(
    own_centres, own_sizes, centres, sizes, order, counts, radius, heads, kv_heads, own_length,
    length, own_blocks, blocks, shift, window, margin, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    SHARED: tl.constexpr, BY_KEY: tl.constexpr, OWN_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, CHUNK: tl.constexpr,
):
    """The list of one tile, ascending. BY_KEY: of keys, and what it lists are tiles of queries."""
    batch_head = tl.program_id(0) // own_blocks
    own_block = tl.program_id(0) % own_blocks
    batch, head = batch_head // heads, batch_head % heads
    own_row = vectors_row(batch, head, heads, SHARED)
    row = vectors_row(batch, head // (heads // kv_heads), kv_heads, SHARED)
    first = own_block * OWN_BLOCK
    last = tl.minimum(first + OWN_BLOCK, own_length) - 1
    if BY_KEY:
        own_row, row = row, own_row
        low, _, _, high = query_span(
            first, last, 0, 0, shift, window, length, CAUSAL, WINDOW, False, "none", False, BLOCK
        )
    else:
        low, _, _, high = key_span(
            first, last, 0, 0, shift, window, length, CAUSAL, WINDOW, False, "none", False, BLOCK
        )
    own_tile = own_row.to(tl.int64) * own_blocks + own_block
    columns = tl.arange(0, BLOCK_D)
    own_centre = tl.load(own_centres + own_tile * BLOCK_D + columns)
    own_away = tl.load(own_sizes + 2 * own_tile)
    own_longest = tl.load(own_sizes + 2 * own_tile + 1)
    farthest = tl.load(radius + head)
    order += tl.program_id(0).to(tl.int64) * blocks
    found = 0
    high = tl.cdiv(high, BLOCK)
    for begin in range(low // BLOCK, high, CHUNK):
        block = begin + tl.arange(0, CHUNK)
        inside = block < high
        tile = row.to(tl.int64) * blocks + block
        at = centres + tile[:, None] * BLOCK_D + columns[None, :]
        between = tl.load(at, mask=inside[:, None], other=0.0) - own_centre[None, :]
        away = tl.load(sizes + 2 * tile, mask=inside, other=0.0)
        longest = tl.load(sizes + 2 * tile + 1, mask=inside, other=0.0) + own_longest
        gap = tl.sqrt(tl.sum(between * between, 1)) - own_away - away
        limit = farthest * farthest + margin * longest * longest
        beyond = (gap > 0) & (gap * gap > limit)
        near = tl.where(beyond, 0, inside.to(tl.int32))
        tl.store(order + found + tl.cumsum(near, 0) - near, block, mask=near > 0)
        found += tl.sum(near, 0)
    tl.store(counts + tl.program_id(0), found)


# fmt: on


def lists_of(
    q: Tensor,
    k: Tensor,
    radius: Tensor,
    rows: int,
    columns: int,
    *,
    causal: bool = False,
    window: int = 0,
    by_key: bool = False,
    shape: tuple[int, int, int] | None = None,
    shared: int = 0,
) -> tuple[Tensor, Tensor]:
    """Lists `[B, H, n, m]` int32, of which the first `counts` `[B, H, n]` entries count: of tiles
    of `columns` keys for each tile of `rows` queries; `by_key`: of tiles of queries for each tile
    of keys. Causality and windows are kept, ranges and masks not looked at.

    q: `[B, H, Tq, D]`, k: `[B, Hkv, Tk, D]`, or as `Problem.queries_and_keys` has them where they
    are `shared`; then `shape` is (B, H, Hkv). radius: `[H]` in float32.
    """
    batch, heads, kv_heads = shape or (q.shape[0], q.shape[1], k.shape[1])
    own, other, own_block, block = (k, q, columns, rows) if by_key else (q, k, rows, columns)
    own_blocks = triton.cdiv(own.shape[2], own_block)
    blocks = triton.cdiv(other.shape[2], block)
    order = torch.empty((batch, heads, own_blocks, blocks), dtype=torch.int32, device=q.device)
    counts = torch.empty((batch, heads, own_blocks), dtype=torch.int32, device=q.device)
    reach_kernel[(counts.numel(),)](
        *_spheres(own, own_block),
        *_spheres(other, block),
        order,
        counts,
        radius,
        heads,
        kv_heads,
        own.shape[2],
        other.shape[2],
        own_blocks,
        blocks,
        k.shape[2] - q.shape[2],
        window,
        4 * (q.shape[3] + 8) * torch.finfo(torch.float32).eps,
        CAUSAL=causal,
        WINDOW=window > 0,
        SHARED=shared,
        BY_KEY=by_key,
        OWN_BLOCK=own_block,
        BLOCK=block,
        BLOCK_D=block_of(q.shape[3]),
        CHUNK=_CHUNK,
        num_warps=4,
    )
    return order, counts


def reach_arguments(
    problem: Problem, rows: int, columns: int, by_key: bool = False
) -> tuple[Tensor, Tensor, dict[str, int | bool]]:
    """Of a kernel that goes over tiles: order and counts of the lists, where the call has a hard
    cutoff and is long, and the arguments that are no tensors."""
    if not skips(problem):
        return problem.strength, problem.strength, {"listed": 0, "SKIPS": False}
    order, counts = lists_of(
        *problem.queries_and_keys(),
        problem.radius,
        rows,
        columns,
        causal=problem.causal,
        window=problem.window,
        by_key=by_key,
        shape=(problem.batch, problem.heads, problem.kv_heads),
        shared=problem.form.shared,
    )
    return order, counts, {"listed": order.shape[3], "SKIPS": True}


def skips(problem: Problem) -> bool:
    """Whether tiles out of reach are skipped. Lifted keys are at other distances than vectors."""
    return (
        problem.cutoff == "hard"
        and problem.key_radius_sq is None
        and problem.q is not None
        and problem.keys >= LEAST_KEYS
    )


def _spheres(x: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Centres and sizes of tiles of `x` `[B', N', T, D]`."""
    batch, heads, length, width = x.shape
    blocks, block_d = triton.cdiv(length, block), block_of(width)
    centres = torch.empty(batch * heads * blocks, block_d, dtype=torch.float32, device=x.device)
    sizes = torch.empty(batch * heads * blocks, 2, dtype=torch.float32, device=x.device)
    spheres_kernel[(batch * heads * blocks,)](
        x,
        centres,
        sizes,
        length,
        blocks,
        heads,
        *x.stride()[:3],
        width,
        BLOCK=block,
        BLOCK_D=block_d,
        num_warps=4,
    )
    return centres, sizes
