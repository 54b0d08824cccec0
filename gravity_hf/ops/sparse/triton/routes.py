"""The choices of all heads turned round, without waiting for the device: see `..routing`.

Four kernels: each choice sets a bit of its block, tiles are counted, then the bits of each block,
and each choice has its place by how many bits come before its own. Bits and counts are integers, so
that atomic operations leave the same whatever their order.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..selecting import Selection
from .launching import start

# Rows of a tile, one for each query head of each query.
TILE = 64
# Choices, blocks, words of bits that a program takes at a time.
_CHOICES, _COUNTED, _WORDS = 512, 1024, 256


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
    count; bits int32 `[B, G, blocks, words]` and counts `[B, G, blocks]`, 0 before. places: 0
    where a choice will have one, else -1."""
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
    tl.store(places + at, tl.where(meant, 0, -1), mask=real)


@triton.jit
def edges_kernel(
    counts, edges, every, GROUPS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):
    """One program."""
    tl.store(edges, 0)
    done = 0
    for at in range(0, every, STEP):
        code = at + tl.arange(0, STEP)
        rows = tl.load(counts + code, mask=code < every, other=0) * GROUPS
        tiles = (rows + TILE - 1) // TILE
        tl.store(edges + 1 + code, done + tl.cumsum(tiles, 0), mask=code < every)
        done += tl.sum(tiles, 0)


@triton.jit
def ones(x):
    """How many bits of an int32 are set."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit
def count_kernel(
    bits, before, edges, rows_of, block_of, words, GROUPS: tl.constexpr, TILE: tl.constexpr,
    WORDS: tl.constexpr,
):
    """Program: a block of a batch row and key head. before int32 `[B, G, blocks, words]`: set bits
    in the words before each."""
    code = tl.program_id(0)
    line = code.to(tl.int64) * words
    found = 0
    for at in range(0, words, WORDS):
        word = at + tl.arange(0, WORDS)
        count = ones(tl.load(bits + line + word, mask=word < words, other=0))
        tl.store(before + line + word, found + tl.cumsum(count, 0) - count, mask=word < words)
        found += tl.sum(count, 0)
    tile, end = tl.load(edges + code), tl.load(edges + code + 1)
    rest = tile * TILE + found * GROUPS + tl.arange(0, TILE)
    tl.store(rows_of + rest, -1, mask=rest < end * TILE)
    for at in range(tile, end, WORDS):
        some = at + tl.arange(0, WORDS)
        tl.store(block_of + some, code, mask=some < end)


@triton.jit
def place_kernel(
    chosen, places, bits, before, edges, rows_of, total, queries, blocks, words, stored,
    GROUPS: tl.constexpr, CHOICES: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):
    """Program: some of `total` choices."""
    at = tl.program_id(0).to(tl.int64) * STEP + tl.arange(0, STEP)
    real = at < total
    meant = real & (tl.load(places + at, mask=real, other=-1) == 0)
    row = at // CHOICES
    query = (row % queries).to(tl.int32)
    block = tl.load(chosen + row * stored + at % CHOICES, mask=meant, other=0)
    code = row // queries * blocks + block
    word = code * words + query // 32
    bit = tl.full([STEP], 1, tl.int32) << (query % 32)
    rank = tl.load(before + word, mask=meant, other=0)
    rank += ones(tl.load(bits + word, mask=meant, other=0) & (bit - 1))
    place = tl.load(edges + code, mask=meant, other=0) * TILE + rank * GROUPS
    tl.store(places + at, place, mask=meant)
    for member in range(0, GROUPS):
        tl.store(rows_of + place + member, query * GROUPS + member, mask=meant)
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
    before = first.new_empty(every * words)
    # One allocation set to 0; addresses stay multiples of 16 bytes.
    aligned = -(-every // 4) * 4
    counts, bits = first.new_zeros(aligned + every * words).split((aligned, every * words))
    all_choices = {"CHOICES": choices, "STEP": _CHOICES, "num_warps": 4}
    tiled = {"GROUPS": groups, "TILE": TILE, "num_warps": 4}
    programs = (triton.cdiv(total, _CHOICES),)
    with torch.cuda.device_of(chosen):
        start(
            mark_kernel, programs,
            {"chosen": chosen, "first": first, "last": last, "bits": bits, "counts": counts,
             "places": places},
            {"total": total, "queries": queries, "blocks": blocks, "words": words,
             "key_heads": key_heads, "first_rows": first.shape[1], "stored": stored},
            {**all_choices, "DENSE": budget.dense_length},
        )  # fmt: skip
        start(
            edges_kernel, (1,), {"counts": counts, "edges": edges}, {"every": every},
            {**tiled, "STEP": _COUNTED},
        )  # fmt: skip
        start(
            count_kernel, (every,),
            {"bits": bits, "before": before, "edges": edges, "rows_of": rows, "block_of": block},
            {"words": words}, {**tiled, "WORDS": _WORDS},
        )  # fmt: skip
        start(
            place_kernel, programs,
            {"chosen": chosen, "places": places, "bits": bits, "before": before, "edges": edges,
             "rows_of": rows},
            {"total": total, "queries": queries, "blocks": blocks, "words": words,
             "stored": stored},
            {**tiled, **all_choices},
        )  # fmt: skip
    return DeviceTiles(rows, block, places, edges)
