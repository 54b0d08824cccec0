"""Which keys a tile of queries sees: loop bounds that skip hidden tiles, and the mask of one tile.

Query `i` stands at position `p = i + shift`, `shift = Tk - Tq`. It sees key `j` where all of these
hold that are switched on: `j <= p` (CAUSAL); `p - j < window`, on both sides unless causal
(WINDOW); `start_i <= j < stop_i` (RANGES); the dense mask (MASK).
"""

from __future__ import annotations

import triton
import triton.language as tl


# fmt: off
@triton.jit
def load_ranges(ranges, batch, rows, rows_valid, stride_b, stride_row, RANGES: tl.constexpr):
    """First and one past the last key of each row. Rows past the end see nothing, and must not
    widen the loop either: they get an empty range whose bounds are the identity of min and max."""
    if RANGES:
        at = ranges + batch * stride_b + rows * stride_row
        start = tl.load(at, mask=rows_valid, other=2**30)
        stop = tl.load(at + 1, mask=rows_valid, other=0)
        return start, stop
    else:
        return tl.zeros_like(rows), tl.zeros_like(rows) + 2**30


@triton.jit
def tiled_span(
    low, full_low, full_high, high, start, stop, CAUSAL: tl.constexpr, RANGES: tl.constexpr,
    MASK: tl.constexpr, EXCLUDE_SELF: tl.constexpr, BLOCK: tl.constexpr,
):
    """A span narrowed to ranges and widened (what all see: narrowed) to whole tiles. Behind a dense
    mask, or where a pair is excluded anywhere, no tile is seen whole."""
    if RANGES:
        low = tl.maximum(low, tl.min(start, 0))
        high = tl.minimum(high, tl.max(stop, 0))
        full_low = tl.maximum(full_low, tl.max(tl.where(start == 2**30, 0, start), 0))
        full_high = tl.minimum(full_high, tl.min(tl.where(start == 2**30, 2**30, stop), 0))
    high = tl.maximum(high, 0)
    low = tl.minimum(low, high) // BLOCK * BLOCK
    full_low = tl.maximum((full_low + BLOCK - 1) // BLOCK * BLOCK, low)
    full_high = tl.maximum(full_high, 0) // BLOCK * BLOCK
    full_low = tl.minimum(full_low, tl.cdiv(high, BLOCK) * BLOCK)
    full_high = tl.maximum(full_high, full_low)
    if MASK != "none" or (EXCLUDE_SELF and not CAUSAL):
        full_low = low
        full_high = low
    return low, full_low, full_high, high


@triton.jit
def key_span(
    first, last, start, stop, shift, window, keys, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    RANGES: tl.constexpr, MASK: tl.constexpr, EXCLUDE_SELF: tl.constexpr, BLOCK: tl.constexpr,
):
    """For queries `first .. last`: keys `low .. high` that some query may see, and within them
    `full_low .. full_high`, which every query sees. Both are multiples of BLOCK, except `high`."""
    low = 0
    high = keys
    full_low = 0
    full_high = keys
    if CAUSAL:
        high = tl.minimum(high, last + shift + 1)
        full_high = tl.minimum(full_high, first + shift + 1)
        if EXCLUDE_SELF:
            full_high = tl.minimum(full_high, first + shift)
    if WINDOW:
        low = tl.maximum(low, first + shift - window + 1)
        full_low = tl.maximum(full_low, last + shift - window + 1)
        if not CAUSAL:
            high = tl.minimum(high, last + shift + window)
            full_high = tl.minimum(full_high, first + shift + window)
    return tiled_span(
        low, full_low, full_high, high, start, stop, CAUSAL, RANGES, MASK, EXCLUDE_SELF, BLOCK
    )


@triton.jit
def query_span(
    first, last, start, stop, shift, window, queries, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    RANGES: tl.constexpr, MASK: tl.constexpr, EXCLUDE_SELF: tl.constexpr, BLOCK: tl.constexpr,
):
    """`key_span` seen from keys `first .. last`: which queries may see, and all see, them. `start`
    and `stop` are the ranges of queries that see each key."""
    low = 0
    high = queries
    full_low = 0
    full_high = queries
    if CAUSAL:
        low = tl.maximum(low, first - shift)
        full_low = tl.maximum(full_low, last - shift)
        if EXCLUDE_SELF:
            full_low = tl.maximum(full_low, last - shift + 1)
    if WINDOW:
        high = tl.minimum(high, last - shift + window)
        full_high = tl.minimum(full_high, first - shift + window)
        if not CAUSAL:
            low = tl.maximum(low, first - shift - window + 1)
            full_low = tl.maximum(full_low, last - shift - window + 1)
    return tiled_span(
        low, full_low, full_high, high, start, stop, CAUSAL, RANGES, MASK, EXCLUDE_SELF, BLOCK
    )


@triton.jit
def visible_pairs(
    rows, columns, ranged, start, stop, shift, window, keys, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, RANGES: tl.constexpr,
):
    """Bool; rows and columns broadcast against each other, in either orientation. `ranged` is what
    lies between `start` and `stop`: columns where these are of rows, or the reverse. Says nothing
    about rows past the last one: what they see is not stored, and in the backward weighs 0."""
    if CAUSAL:
        # No row stands past the last key.
        seen = columns <= rows + shift
    else:
        seen = columns < keys
    if WINDOW:
        seen &= rows + shift - columns < window
        if not CAUSAL:
            seen &= columns - (rows + shift) < window
    if RANGES:
        seen &= (ranged >= start) & (ranged < stop)
    return seen


@triton.jit
def load_mask(
    mask, batch, head, rows, columns, seen, queries, keys, stride_b, stride_h, stride_row,
    stride_column, lowest, MASK: tl.constexpr,
):
    """A tile of the dense mask: what is seen, and what is added to scores in natural units. A float
    mask hides at and below half of its dtype's lowest value, `lowest`."""
    at = mask + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    at = at + rows.to(tl.int64) * stride_row + columns.to(tl.int64) * stride_column
    seen = seen & (rows < queries) & (columns < keys)
    if MASK == "bool":
        return seen & (tl.load(at, mask=seen, other=0) != 0), 0.0
    else:
        added = tl.load(at, mask=seen, other=0.0).to(tl.float32)
        seen &= added > lowest
        return seen, tl.where(seen, added, 0.0)
