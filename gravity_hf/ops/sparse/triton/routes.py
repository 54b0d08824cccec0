"""The choices of all heads turned round, without waiting for the device: see `..routing`.

Three kernels: each choice sets a bit of its block, tiles are counted, and each block writes the
queries whose bits are set, in their order. Bits and counts are integers, so that atomic operations
leave the same whatever their order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..selecting import Selection

# Rows of a tile, one for each query head of each query.
TILE = 64
# Choices, blocks, words of bits that a program takes at a time.
_CHOICES, _COUNTED, _WORDS = 1024, 1024, 32


class DeviceTiles(NamedTuple):
    """rows: int32 `[tiles * TILE]`, query times group size plus the head's place in its group; -1
    where a place is empty. block: int32 `[tiles]`, of `B * G * blocks`. places: int32 `[B, G, Tq,
    N]`, where the first row of each choice lies; -1 where there is none. edges: int32 `[B * G *
    blocks + 1]`: tiles of block `u` are those from `edges[u]` to before `edges[u + 1]`, and there
    are `edges[-1]` in all: what rows and block hold of later ones is nothing.

    Queries that see few keys, and so all of them, are in no tile: to them all keys are near."""

    rows: Tensor
    block: Tensor
    places: Tensor
    edges: Tensor


# fmt: off
@triton.jit
def mark_kernel(
    chosen, first, last, bits, counts, places, total, queries, blocks, words, key_heads,
    first_rows, stored, CHOICES: tl.constexpr, DENSE: tl.constexpr, STEP: tl.constexpr,
):
    """Program: some of `total` choices. chosen int64 `[B, G, Tq, stored]`, of which `CHOICES`
    count; bits int32 `[B, G, blocks, words]` and counts `[B, G, blocks]`, 0 before."""
    at = tl.program_id(0).to(tl.int64) * STEP + tl.arange(0, STEP)
    real = at < total
    row = at // CHOICES
    query = (row % queries).to(tl.int32)
    lead = row // queries
    batch = lead // key_heads
    block = tl.load(chosen + row * stored + at % CHOICES, mask=real, other=-1)
    own = tl.load(last + batch * queries + query, mask=real, other=0)
    least = tl.minimum(query, first_rows - 1)
    begin = tl.load(first + batch * first_rows + least, mask=real, other=0)
    meant = real & (block >= 0) & (own - begin >= DENSE)
    code = tl.where(meant, lead * blocks + block, 0)
    tl.atomic_add(counts + code, 1, mask=meant)
    bit = tl.full([STEP], 1, tl.int32) << (query % 32)
    tl.atomic_or(bits + code * words + query // 32, bit, mask=meant)
    tl.store(places + at, -1, mask=real & (meant == 0))


@triton.jit
def edges_kernel(
    counts, edges, every, GROUPS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):
    """One program."""
    tl.store(edges, 0)
    done = 0
    for start in range(0, every, STEP):
        code = start + tl.arange(0, STEP)
        rows = tl.load(counts + code, mask=code < every, other=0) * GROUPS
        tiles = (rows + TILE - 1) // TILE
        tl.store(edges + 1 + code, done + tl.cumsum(tiles, 0), mask=code < every)
        done += tl.sum(tiles, 0)


@triton.jit
def place_kernel(
    bits, edges, chosen, rows_of, block_of, places, queries, blocks, words, stored,
    GROUPS: tl.constexpr, CHOICES: tl.constexpr, TILE: tl.constexpr, WORDS: tl.constexpr,
):
    """Program: a block of a batch row and key head."""
    code = tl.program_id(0)
    lead, block = (code // blocks).to(tl.int64), code % blocks
    tile, end = tl.load(edges + code), tl.load(edges + code + 1)
    place = tile * TILE
    for start in range(0, words, WORDS):
        word = start + tl.arange(0, WORDS)
        at = bits + code.to(tl.int64) * words + word
        held = tl.load(at, mask=word < words, other=0)
        if tl.max((held != 0).to(tl.int32), 0) != 0:
            flags = (held[:, None] >> tl.arange(0, 32)[None, :]) & 1
            flags = tl.reshape(flags, [WORDS * 32])
            meant = flags != 0
            own = place + (tl.cumsum(flags, 0) - flags) * GROUPS
            query = start * 32 + tl.arange(0, WORDS * 32)
            for member in range(0, GROUPS):
                tl.store(rows_of + own + member, query * GROUPS + member, mask=meant)
            row = lead * queries + query
            for choice in range(0, CHOICES):
                other = tl.load(chosen + row * stored + choice, mask=meant, other=-1)
                tl.store(places + row * CHOICES + choice, own, mask=meant & (other == block))
            place += tl.sum(flags, 0) * GROUPS
    rest = place + tl.arange(0, TILE)
    tl.store(rows_of + rest, -1, mask=rest < end * TILE)
    for start in range(tile, end, WORDS):
        some = start + tl.arange(0, WORDS)
        tl.store(block_of + some, code, mask=some < end)
# fmt: on


def device_tiles(selection: Selection, first: Tensor, last: Tensor, groups: int) -> DeviceTiles:
    """first, last: int32, of `Visibility.as_int32`."""
    chosen = selection.blocks.contiguous()
    batch, key_heads, queries, stored = chosen.shape
    budget = selection.budget
    blocks = -(-selection.visible.keys // budget.block_size)
    every, choices = batch * key_heads * blocks, min(budget.chosen_blocks, stored)
    places = first.new_empty(batch, key_heads, queries, choices)
    edges = first.new_empty(every + 1)
    if choices == 0:
        return DeviceTiles(first.new_empty(0), first.new_empty(0), places, edges.zero_())
    total, words = places.numel(), -(-queries // 32)
    most = -(-total * groups // TILE) + every
    rows, block = first.new_empty(most * TILE), first.new_empty(most)
    counts, bits = first.new_zeros(every * (1 + words)).split((every, every * words))
    sizes = (queries, blocks, words)
    with torch.cuda.device_of(chosen):
        mark_kernel[(triton.cdiv(total, _CHOICES),)](
            chosen, first, last, bits, counts, places, total, *sizes, key_heads, first.shape[1],
            stored, CHOICES=choices, DENSE=budget.dense_length, STEP=_CHOICES, num_warps=4,
        )  # fmt: skip
        edges_kernel[(1,)](
            counts, edges, every, GROUPS=groups, TILE=TILE, STEP=_COUNTED, num_warps=4
        )
        place_kernel[(every,)](
            bits, edges, chosen, rows, block, places, *sizes, stored, GROUPS=groups,
            CHOICES=choices, TILE=TILE, WORDS=_WORDS, num_warps=4,
        )  # fmt: skip
    return DeviceTiles(rows, block, places, edges)
