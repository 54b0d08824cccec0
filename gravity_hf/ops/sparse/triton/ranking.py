"""The best blocks of each row on a GPU: not sorted, but by the score that enough of them reach.

Scores and block numbers are compared as integers, so that ties go to the later block, as in
`..selecting`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..budget import KeyBudget
from ..visibility import Visibility

# Scores that a program holds.
_HELD = 8192


# fmt: off
@triton.jit
def best_of(
    score, fits, block, COUNT: tl.constexpr, ROWS: tl.constexpr, INDEX_BITS: tl.constexpr,
):
    """Bool `[ROWS, BLOCKS]`: of each row of float32 scores the COUNT best that fit, all where there
    are fewer; block: the number of each column."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    # In the order of the floats, and as unsigned in that of the integers.
    rank = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64) + 2147483648
    rank = tl.where(fits, rank, -1)
    # The highest rank that COUNT blocks reach; 0 where there are fewer.
    limit = tl.zeros([ROWS], tl.int64)
    for step in range(0, 32):
        higher = limit + (tl.full([ROWS], 1, tl.int64) << (31 - step))
        enough = tl.sum((rank >= higher[:, None]).to(tl.int32), 1) >= COUNT
        limit = tl.where(enough, higher, limit)
    above = rank > limit[:, None]
    equal = rank == limit[:, None]
    left = COUNT - tl.sum(above.to(tl.int32), 1)
    # Of equal ones the last: the highest number from which on there are enough.
    edge = tl.zeros([ROWS], tl.int32)
    for step in range(0, INDEX_BITS):
        higher = edge + (tl.full([ROWS], 1, tl.int32) << (INDEX_BITS - 1 - step))
        late = equal & (block[None, :] >= higher[:, None])
        enough = tl.sum(late.to(tl.int32), 1) >= left
        edge = tl.where(enough, higher, edge)
    return above | (equal & (block[None, :] >= edge[:, None]))


@triton.jit
def best_blocks_kernel(
    scores, first, last, whole, origin, best, queries, blocks, first_rows, whole_rows, key_heads,
    places, stride_batch, stride_head, SIZE: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr, COUNT: tl.constexpr, HAS_WHOLE: tl.constexpr, HAS_ORIGIN: tl.constexpr,
    ROWS: tl.constexpr, BLOCKS: tl.constexpr, INDEX_BITS: tl.constexpr,
):
    """Program: `ROWS` queries of a batch row and key head. scores float32 `[B, G, Tq, blocks]`;
    best int64 of `[B, G, Tq, places]`, whose first `COUNT` places are written, in the order of the
    blocks, -1 where there are no more."""
    lead = tl.program_id(1)
    batch, head = (lead // key_heads).to(tl.int64), (lead % key_heads).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = row < queries
    row = tl.minimum(row, queries - 1)
    block = tl.arange(0, BLOCKS)
    real = (block < blocks)[None, :]
    at = (lead.to(tl.int64) * queries + row)[:, None] * blocks + block[None, :]
    score = tl.load(scores + at, mask=real, other=0.0)
    begin = tl.load(first + batch * first_rows + tl.minimum(row, first_rows - 1))[:, None]
    own = tl.load(last + batch * queries + row)[:, None]
    start = block[None, :] * SIZE
    if HAS_ORIGIN:
        start += tl.load(origin + batch).to(tl.int32)
    fits = real & (start >= begin) & (start + SIZE > begin + SINKS)
    fits = fits & (start + SIZE <= own + 1) & (start <= own - WINDOW)
    if HAS_WHOLE:
        flags = (batch * whole_rows + tl.minimum(row, whole_rows - 1))[:, None] * blocks
        fits = fits & (tl.load(whole + flags + block[None, :], mask=real, other=0) != 0)
    chosen = best_of(score, fits, block, COUNT, ROWS, INDEX_BITS)
    order = tl.cumsum(chosen.to(tl.int32), 1) - 1
    at = batch * stride_batch + head * stride_head + row.to(tl.int64) * places
    wanted = chosen & alive[:, None]
    value = tl.broadcast_to(block[None, :], [ROWS, BLOCKS]).to(tl.int64)
    tl.store(best + at[:, None] + order, value, mask=wanted)
# fmt: on


def best_blocks(
    scores: Tensor, seen: Visibility, whole: Tensor | None, budget: KeyBudget, chosen: Tensor
) -> None:
    """Write the best blocks of float32 scores `[B, G, Tq, blocks]`, contiguous, into the first
    places of `chosen`, int64 `[B, G, Tq, N]` of a contiguous tensor, which hold -1.

    whole: bool `[B|1, Tq|1, blocks]`, blocks without hidden keys; None: all.
    """
    batch, key_heads, queries, blocks = scores.shape
    padded = triton.next_power_of_2(max(blocks, 2))
    rows = max(1, min(64, _HELD // padded))
    first, last, origin = seen.as_int32(batch)
    if whole is not None:
        whole = whole.expand(batch, -1, -1).contiguous().view(torch.uint8)
    with torch.cuda.device_of(scores):
        best_blocks_kernel[(triton.cdiv(queries, rows), batch * key_heads)](
            scores, first, last, whole, origin, chosen, queries, blocks, first.shape[1],
            1 if whole is None else whole.shape[1], key_heads, chosen.shape[3],
            chosen.stride(0), chosen.stride(1), SIZE=budget.block_size, WINDOW=budget.window,
            SINKS=budget.sinks, COUNT=min(budget.chosen_blocks, blocks),
            HAS_WHOLE=whole is not None, HAS_ORIGIN=origin is not None, ROWS=rows, BLOCKS=padded,
            INDEX_BITS=padded.bit_length() - 1, num_warps=4,
        )  # fmt: skip
