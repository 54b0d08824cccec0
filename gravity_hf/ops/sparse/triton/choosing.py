"""Scores of blocks and the choice of the best, in one kernel: no row of scores leaves it.

A program goes through the blocks a few at a time and keeps the best so far of each of its queries.
Ties go to the later block, as in `..selecting`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..budget import KeyBudget
from ..visibility import Visibility
from .kernels import load_keys
from .launching import start

# Queries of a program, blocks that it looks at together, and warps.
_ROWS, _BLOCKS, _WARPS = 64, 32, 4


# fmt: off
@triton.jit
def floor_divide(x, y: tl.constexpr):
    """Triton's own division rounds towards 0."""
    return tl.where(x < 0, -((y - 1 - x) // y), x // y)


@triton.jit
def choose_kernel(
    q, means, first, last, whole, origin, chosen, stride_qb, stride_qh, stride_qt, stride_mb,
    stride_mh, stride_mt, queries, blocks, first_rows, whole_rows, key_heads, places,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    COUNT: tl.constexpr, DENSE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr,
    NEAREST: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr, PLACES: tl.constexpr,
):
    """Program: `ROWS` queries of a batch row and key head. chosen int64 `[B, G, Tq, places]`, all
    of which are written: the best blocks, or all of a query that sees few keys, then -1."""
    lead = tl.program_id(1)
    batch, head = (lead // key_heads).to(tl.int64), (lead % key_heads).to(tl.int64)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    alive = row < queries
    row = tl.minimum(row, queries - 1)
    begin = tl.load(first + batch * first_rows + tl.minimum(row, first_rows - 1))
    own = tl.load(last + batch * queries + row)
    zero = 0
    if origin is not None:
        zero = tl.load(origin + batch)
    column = tl.arange(0, WIDTH_PAD)
    query = tl.zeros([ROWS, WIDTH_PAD], tl.float32)
    rows = q + batch * stride_qb + row.to(tl.int64)[:, None] * stride_qt + column[None, :]
    for member in range(0, GROUPS):
        offset = (head * GROUPS + member) * stride_qh
        query += tl.load(rows + offset, mask=(column < WIDTH)[None, :], other=0.0).to(tl.float32)
    query = query / GROUPS
    place = tl.arange(0, PLACES)[None, :]
    # The best so far and their scores. Empty places have no score, and each a number of its own;
    # those that are none are better than all.
    best = tl.zeros([ROWS, PLACES], tl.int32) + (place - PLACES)
    value = tl.where(place < COUNT, -float("inf"), float("inf"))
    value = tl.zeros([ROWS, PLACES], tl.float32) + value
    means += batch * stride_mb + head * stride_mh
    before_window = tl.max(own) - WINDOW + 1 - zero
    if COUNT > 0:
        for low_block in range(0, tl.minimum(blocks, (before_window + SIZE - 1) // SIZE), BLOCKS):
            block = low_block + tl.arange(0, BLOCKS)
            mean = load_keys(means, block, block < blocks, stride_mt, WIDTH, WIDTH_PAD)
            score = tl.dot(query, tl.trans(mean), input_precision="tf32x3")
            if NEAREST:
                score = 2.0 * score - tl.sum(mean * mean, 1)[None, :]
            # What is no number comes first, and what has no end last of what may be chosen.
            score = tl.where(score == score, score, float("inf"))
            score = tl.maximum(score, -3.4028234663852886e38)
            low = (zero + block * SIZE)[None, :]
            fits = (block < blocks)[None, :] & (low >= begin[:, None])
            fits = fits & (low + SIZE > begin[:, None] + SINKS)
            fits = fits & (low + SIZE <= own[:, None] + 1) & (low <= own[:, None] - WINDOW)
            if whole is not None:
                flags = batch * whole_rows + tl.minimum(row, whole_rows - 1)
                at = whole + flags[:, None] * blocks + block[None, :]
                fits = fits & (tl.load(at, mask=(block < blocks)[None, :], other=0) != 0)
            score = tl.where(fits, score, -float("inf"))
            worst = tl.min(value, 1)[:, None]
            # No row takes more of these blocks than are as good as its worst.
            better = tl.sum(((score >= worst) & fits).to(tl.int32), 1)
            for _ in range(0, tl.minimum(tl.max(better, 0), COUNT)):
                top = tl.max(score, 1)[:, None]
                # Of equal ones the last is taken, and the first is given up.
                new = tl.max(tl.where(score == top, block[None, :], -1), 1)[:, None]
                old = tl.min(tl.where(value == worst, best, 2147483647), 1)[:, None]
                takes = (top > worst) | ((top == worst) & (new > old) & (top > -float("inf")))
                here = takes & (value == worst) & (best == old)
                best = tl.where(here, new, best)
                value = tl.where(here, top, value)
                score = tl.where(block[None, :] == new, -float("inf"), score)
                worst = tl.min(value, 1)[:, None]
    found = tl.where((place < COUNT) & (best >= 0), best, -1)
    few = (own - begin < DENSE)[:, None]
    listed = floor_divide(begin - zero, SIZE)[:, None] + place
    listed = tl.where(listed <= floor_divide(own - WINDOW - zero, SIZE)[:, None], listed, -1)
    found = tl.where(few, listed, found).to(tl.int64)
    to = (lead.to(tl.int64) * queries + row)[:, None] * places + place
    tl.store(chosen + to, found, mask=alive[:, None] & (place < places))
# fmt: on


def choose_blocks(
    screen_q: Tensor,
    means: Tensor,
    seen: Visibility,
    whole: Tensor | None,
    budget: KeyBudget,
    metric: str,
    places: int,
) -> Tensor:
    """int64 `[B, G, Tq, places]`: `Selection.blocks`.

    screen_q: `[B, H, Tq, ds]`. means: float32 `[B, G, blocks, ds]`. whole: bool `[B|1, Tq|1,
    blocks]`, blocks without hidden keys; None: all.
    """
    batch, key_heads, blocks, width = means.shape
    heads, queries = screen_q.shape[1:3]
    padded = max(16, triton.next_power_of_2(width))
    screen_q, means = (x if x.stride(3) == 1 else x.contiguous() for x in (screen_q, means))
    first, last, origin = seen.as_int32(batch)
    if whole is not None:
        whole = whole.expand(batch, -1, -1).contiguous().view(torch.uint8)
    chosen = torch.empty(
        batch, key_heads, queries, places, dtype=torch.int64, device=screen_q.device
    )
    tensors = {
        "q": screen_q, "means": means, "first": first, "last": last, "whole": whole,
        "origin": origin, "chosen": chosen,
    }  # fmt: skip
    numbers = {
        **dict(zip(("stride_qb", "stride_qh", "stride_qt"), screen_q.stride()[:3], strict=True)),
        **dict(zip(("stride_mb", "stride_mh", "stride_mt"), means.stride()[:3], strict=True)),
        "queries": queries, "blocks": blocks, "first_rows": first.shape[1],
        "whole_rows": 1 if whole is None else whole.shape[1], "key_heads": key_heads,
        "places": places,
    }  # fmt: skip
    constants = {
        "GROUPS": heads // key_heads, "SIZE": budget.block_size, "WINDOW": budget.window,
        "SINKS": budget.sinks, "COUNT": min(budget.chosen_blocks, blocks),
        "DENSE": budget.dense_length, "WIDTH": width, "WIDTH_PAD": padded,
        "NEAREST": metric == "distance", "ROWS": _ROWS, "BLOCKS": _BLOCKS,
        "PLACES": triton.next_power_of_2(max(places, 2)), "num_warps": _WARPS,
    }  # fmt: skip
    with torch.cuda.device_of(screen_q):
        grid = (triton.cdiv(queries, _ROWS), batch * key_heads)
        start(choose_kernel, grid, tensors, numbers, constants)
    return chosen
