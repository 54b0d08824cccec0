"""Gravity attention for few queries and many keys: a generated token against its cache.

Such a step takes as long as reading keys and values once, so the keys are split over many programs,
each of which serves all query heads of a key head at once (split-KV decoding, as in FlashDecoding,
Dao et al. 2023). A second, small kernel merges the splits in a fixed order: results do not vary.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .problem import interpreted
from .score import (
    EXCLUDED,
    LOG2E,
    add_sink,
    capped,
    curved,
    general_scores,
    logarithm,
    power_of_two,
    product,
    reciprocal,
    told_apart,
)

MAX_QUERIES = 16
MAX_ROWS = 64
MAX_WIDTH = 256

# Splits that the merging kernel holds in registers at a time.
MERGED_AT_ONCE = tl.constexpr(16)


class Tiling(NamedTuple):
    """How one call is cut up. `splits` programs share the keys of each key head, `block_keys` at a
    time; `warps` and `stages` (blocks in flight) are Triton's."""

    splits: int
    block_keys: int
    warps: int
    stages: int


def serves_decoding(queries: int, heads: int, kv_heads: int, width: int) -> bool:
    """Whether `decode_attention` takes `queries` rows per head; `width` is the larger of D, Dv."""
    rows = queries * (heads // kv_heads)
    return 0 < queries <= MAX_QUERIES and rows <= MAX_ROWS and width <= MAX_WIDTH


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    strength: Tensor,
    eps: Tensor,
    *,
    law: str,
    key_radius_sq: Tensor | None = None,
    query_mass: Tensor | None = None,
    key_term: Tensor | None = None,
    mask: Tensor | None = None,
    causal: bool = False,
    window: int | None = None,
    key_ranges: Tensor | None = None,
    sink: Tensor | None = None,
    head_bias: Tensor | None = None,
    repulsive: bool = False,
    cutoff: str = "none",
    radius: Tensor | None = None,
    cutoff_width: float = 1.0,
    exclude_self: bool = False,
    max_force: float = math.inf,
    cap: str = "clamp",
    kappa: float | None = None,
    horizon: float = 1.0,
    tiling: Tiling | None = None,
) -> Tensor:
    """`softmax_j(score_ij) v_j` for few queries, without gradient; see `..api.gravity_attention`.

    Args:
        q: `[B, H, Tq, D]`, with `serves_decoding(Tq, H, Hkv, max(D, Dv))`; q and k are float32, or
            all three are of one half precision.
        k, v: `[B, Hkv, Tk, D]`, `[B, Hkv, Tk, Dv]`, any strides: a cache is read in place.
        strength: `M^2` `[H]`; eps `[H]`, key_radius_sq `[Hkv]`, query_mass `[B, H, Tq]` likewise.
        key_term: `[B, H, Tk]`, `b_j` (law "force") or `log2 b_j` (law "power").
        mask, causal, window, key_ranges: which keys a row sees. Keys outside of all `key_ranges`,
            the window and the triangle are not read, so a static cache costs what is in it.
        sink: the score of the row's sink, `[B, H, Tq]` in float32.
        head_bias, repulsive, exclude_self: as in the API; head_bias `[H]`.
        cutoff, radius, cutoff_width: kind ("none": there is none), `[H]` and width of a cutoff.
        max_force, cap: the score's ceiling, "clamp" or "tanh"; infinite: none. Law "force".
        kappa, horizon: see `score.curved`; None: distances are not curved.
        tiling: overrides `choose_tiling`.

    Returns:
        `[B, H, Tq, Dv]`, contiguous, in the dtype of `v`. Rows that see no key are 0.
    """
    batch, heads, queries, width = q.shape
    _, kv_heads, keys, value_width = v.shape
    groups = heads // kv_heads
    if not serves_decoding(queries, heads, kv_heads, max(width, value_width)):
        raise ValueError(
            f"decode_attention: q: expected at most {MAX_QUERIES} queries, {MAX_ROWS} rows per key "
            f"head and width {MAX_WIDTH}, got {queries}, {queries * groups} and "
            f"{max(width, value_width)}; use the kernel for long queries"
        )
    out = torch.empty(batch, heads, queries, value_width, dtype=v.dtype, device=v.device)
    if out.numel() == 0:
        return out
    tiles, rows = batch * kv_heads, groups * queries
    if tiling is None:
        reach = keys if window is None else min(keys, (window + queries) * (1 if causal else 2))
        tiling = choose_tiling(tiles, rows, reach, width, value_width, v.dtype, q.device, k.dtype)
    merged = tiling.splits > 1
    partial, stats = out, None
    if merged:
        shape = (tiles, tiling.splits, rows)
        partial = torch.empty(*shape, value_width, dtype=torch.float32, device=v.device)
        stats = torch.empty(*shape, 2, dtype=torch.float32, device=v.device)

    hidden_below = 0.0
    if mask is not None:
        mask, hidden_below = _mask_for_kernel(mask, (batch, heads, queries, keys))
    if key_ranges is not None:
        key_ranges = key_ranges.expand(batch, queries, 2)
    with torch.cuda.device_of(q):
        _decode_kernel[(tiles * tiling.splits,)](
            q, k, v, partial, stats,
            strength.contiguous(), eps.contiguous(),
            None if key_radius_sq is None else key_radius_sq.contiguous(),
            query_mass, key_term, mask, key_ranges, None if merged else sink, head_bias, radius,
            *q.stride(), *k.stride(), *v.stride(),
            *_strides(query_mass, 3), *_strides(key_term, 3),
            *_strides(mask, 4), *_strides(key_ranges, 3),
            keys, tiling.splits, window, hidden_below, max_force, kappa or 0.0, horizon,
            cutoff_width,
            KV_HEADS=kv_heads, GROUPS=groups, QUERIES=queries,
            WIDTH=width, VALUE_WIDTH=value_width,
            BLOCK_ROWS=max(16, triton.next_power_of_2(rows)), BLOCK_KEYS=tiling.block_keys,
            BLOCK_WIDTH=_padded(width), BLOCK_VALUE_WIDTH=_padded(value_width),
            LAW=law, CAP="none" if max_force == math.inf else cap, CURVED=kappa is not None,
            GENERAL=repulsive or head_bias is not None or radius is not None,
            REPULSIVE=repulsive, CUTOFF=cutoff, EXCLUDE_SELF=exclude_self, CAUSAL=causal,
            BOOL_MASK=mask is not None and not mask.is_floating_point(), MERGED=merged,
            PRECISION="ieee" if k.dtype == torch.float32 else "tf32",
            NATIVE=not interpreted(),
            num_warps=tiling.warps, num_stages=tiling.stages,
        )  # fmt: skip
        if merged:
            _merge_kernel[(tiles * rows,)](
                partial, stats, sink, out, tiling.splits,
                ROWS=rows, VALUE_WIDTH=value_width, BLOCK_VALUE_WIDTH=_padded(value_width),
                NATIVE=not interpreted(), num_warps=4,
            )  # fmt: skip
    return out


# A split with fewer keys costs more to merge than it saves.
MIN_KEYS_PER_SPLIT = 256
MAX_SPLITS = 128


def choose_tiling(
    tiles: int,
    rows: int,
    keys: int,
    width: int,
    value_width: int,
    dtype: torch.dtype,
    device: torch.device,
    vectors: torch.dtype | None = None,
) -> Tiling:
    """For `tiles` = batch size times key heads, each with `keys` keys and `rows` rows. `dtype` is
    that of values, and of keys unless `vectors` is given. Reads
    nothing on the device, so a static cache is split by its allocated length; the kernel then
    divides what is valid evenly."""
    processors, shared_bytes = _device_limits(device)
    key_bytes = _padded(width) * (vectors or dtype).itemsize + _padded(value_width) * dtype.itemsize
    # Programs that fit an SM: together they keep some 64 kB of loads on their way, which is what
    # the latency of an H100's or H200's memory asks for.
    together = 2
    if dtype == torch.float32:
        # Without tensor cores: small blocks, whose products fit the registers.
        block_keys, warps = (16 if key_bytes > 1024 else 32), 8
    elif key_bytes <= 512:
        # 64 keys are the least that Hopper's tensor cores take, and let keys stay swizzled.
        block_keys = 128 if key_bytes <= 256 else 64
        warps, together = (4, 2) if rows <= 32 else (8, 1)
    elif shared_bytes > 200 * 1024:
        block_keys, warps, together = 64, 8, 1
    else:
        block_keys, warps = 32, 8
    most = min(triton.cdiv(keys, MIN_KEYS_PER_SPLIT), MAX_SPLITS)
    # Two blocks of 32 kB on their way are as many as the memory keeps up with; a third was slower.
    stages = 2 if warps == 4 and block_keys == 64 else 3
    return Tiling(_split_count(tiles, most, processors * together), block_keys, warps, stages)


@lru_cache(maxsize=4096)
def _split_count(tiles: int, most: int, slots: int) -> int:
    """The fewest splits whose programs keep `slots` busy nearly as well as any number up to `most`:
    the last round of programs is the one that may leave slots idle."""

    def busy(splits: int) -> float:
        return tiles * splits / (triton.cdiv(tiles * splits, slots) * slots)

    best = max(busy(splits) for splits in range(1, most + 1)) if most > 1 else 0.0
    return next((s for s in range(1, most + 1) if busy(s) >= 0.9 * best), 1)


@lru_cache(maxsize=64)
def _device_limits(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and bytes of shared memory that one program may have."""
    if device.type != "cuda":
        return 1, 0
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.shared_memory_per_block_optin


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _strides(tensor: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if tensor is None else tensor.stride()


def _mask_for_kernel(mask: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, float]:
    """The mask as a view of full shape, and the value at and below which a float hides a key."""
    if mask.dtype == torch.bool:
        return mask.view(torch.uint8).expand(shape), 0.0
    if mask.dtype == torch.float64:
        mask = mask.float()
    return mask.expand(shape), torch.finfo(mask.dtype).min / 2


@triton.jit
def _load_tile(base, inside, stride_row, stride_column, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """Rows `0, 1, ...` from `base`, `[len(inside), BLOCK]`; 0 outside, which is not read."""
    row = tl.arange(0, inside.shape[0])
    column = tl.arange(0, BLOCK)
    wanted = inside[:, None]
    if COLUMNS != BLOCK:
        wanted = wanted & (column < COLUMNS)[None, :]
    return tl.load(
        base + row[:, None] * stride_row + column[None, :] * stride_column, mask=wanted, other=0.0
    )


@triton.jit
def _visible_range(
    query, batch, key_ranges, stride_rb, stride_ri, stride_re, keys, window,
    QUERIES: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """`first <= j < last` for each row, before any mask."""
    position = query + (keys - QUERIES)
    first = tl.zeros_like(query)
    last = first + keys
    if CAUSAL:
        last = tl.minimum(last, position + 1)
    if window is not None:
        first = tl.maximum(first, position - window + 1)
        if not CAUSAL:
            last = tl.minimum(last, position + window)
    if key_ranges is not None:
        row_range = key_ranges + batch * stride_rb + query * stride_ri
        first = tl.maximum(first, tl.load(row_range))
        last = tl.minimum(last, tl.load(row_range + stride_re))
    return first, last


@triton.jit(
    do_not_specialize=[
        "stride_tb", "stride_th", "stride_mb", "stride_mh", "stride_mi",
        "stride_ab", "stride_ah", "stride_ai", "stride_rb", "stride_ri",
        "keys", "splits", "window",
    ]
)  # fmt: skip
def _decode_kernel(
    q, k, v, partial, stats, strength, eps, key_radius_sq, query_mass, key_term, mask, key_ranges,
    sink, head_bias, radius,
    stride_qb, stride_qh, stride_qi, stride_qd,
    stride_kb, stride_kh, stride_kj, stride_kd,
    stride_vb, stride_vh, stride_vj, stride_vd,
    stride_ab, stride_ah, stride_ai,
    stride_tb, stride_th, stride_tj,
    stride_mb, stride_mh, stride_mi, stride_mj,
    stride_rb, stride_ri, stride_re,
    keys, splits, window, hidden_below, ceiling, kappa, horizon, cutoff_width,
    KV_HEADS: tl.constexpr, GROUPS: tl.constexpr, QUERIES: tl.constexpr,
    WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEYS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr, BLOCK_VALUE_WIDTH: tl.constexpr,
    LAW: tl.constexpr, CAP: tl.constexpr, CURVED: tl.constexpr, GENERAL: tl.constexpr,
    REPULSIVE: tl.constexpr, CUTOFF: tl.constexpr, EXCLUDE_SELF: tl.constexpr, CAUSAL: tl.constexpr,
    BOOL_MASK: tl.constexpr,
    MERGED: tl.constexpr, PRECISION: tl.constexpr, NATIVE: tl.constexpr,
):  # fmt: skip
    """One split of the keys of one key head, for all its rows (row = head in group, query).

    MERGED: writes sums to `partial` `[tiles, splits, rows, Dv]` and (maximum, total) to `stats`;
    otherwise `partial` is the output `[B, H, Tq, Dv]`.
    """
    ROWS: tl.constexpr = GROUPS * QUERIES
    FORCE: tl.constexpr = LAW == "force"
    HAS_A: tl.constexpr = query_mass is not None
    HAS_B: tl.constexpr = 0 if key_term is None else 1 if FORCE else 2
    # Where the kernels for many queries run their general code.
    TELLS: tl.constexpr = GENERAL or HAS_A or HAS_B == 1 or CAP != "none"
    program = tl.program_id(0)
    tile = program // splits
    split = program % splits
    kv_head = (tile % KV_HEADS).to(tl.int64)
    batch = (tile // KV_HEADS).to(tl.int64)
    row = tl.arange(0, BLOCK_ROWS)
    real = row < ROWS
    query = row % QUERIES
    head = kv_head * GROUPS + row // QUERIES

    first, last = _visible_range(
        query, batch, key_ranges, stride_rb, stride_ri, stride_re, keys, window, QUERIES, CAUSAL
    )
    seeing = real & (first < last)
    lowest = tl.min(tl.where(seeing, first, keys))
    highest = tl.max(tl.where(seeing, last, 0))
    # Whole blocks per split; a row's own limits end where the split does.
    share = tl.cdiv(tl.maximum(highest - lowest, 0), splits * BLOCK_KEYS) * BLOCK_KEYS
    start = lowest + split * share
    stop = tl.minimum(start + share, highest)
    last = tl.where(seeing, tl.minimum(last, stop), 0)

    # [BLOCK_ROWS, BLOCK_WIDTH]
    q_row = q + batch * stride_qb + head[:, None] * stride_qh + query[:, None] * stride_qi
    column = tl.arange(0, BLOCK_WIDTH)[None, :]
    q_tile = tl.load(q_row + column * stride_qd, mask=real[:, None] & (column < WIDTH), other=0.0)
    q_float = q_tile.to(tl.float32)
    query_sq = tl.sum(q_float * q_float, 1)
    if key_radius_sq is not None:
        query_sq += tl.load(key_radius_sq + kv_head).to(tl.float32)
    softening = tl.load(eps + head, mask=real, other=1.0).to(tl.float32)
    scale = tl.load(strength + head, mask=real, other=0.0).to(tl.float32)
    query_factor = tl.full([BLOCK_ROWS], 1.0, tl.float32)
    if HAS_A:
        masses = query_mass + batch * stride_ab + head * stride_ah + query * stride_ai
        query_factor = tl.load(masses, mask=real, other=0.0).to(tl.float32)
    bias = 0.0
    radius_sq = 0.0
    if head_bias is not None:
        bias = tl.load(head_bias + head, mask=real, other=0.0)[None, :]
    if CUTOFF != "none":
        radius_sq = tl.load(radius + head, mask=real, other=1.0)[None, :]
        radius_sq = radius_sq * radius_sq
    if not GENERAL:
        scale *= query_factor
        if FORCE and CAP == "none":
            scale *= LOG2E

    k += batch * stride_kb + kv_head * stride_kh
    v += batch * stride_vb + kv_head * stride_vh
    maximum = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    # Added up over keys after the loop: one exchange between warps less per block.
    total = tl.zeros([BLOCK_KEYS, BLOCK_ROWS], tl.float32)
    sums = tl.zeros([BLOCK_VALUE_WIDTH, BLOCK_ROWS], tl.float32)
    for begin in range(start, stop, BLOCK_KEYS):
        key = begin + tl.arange(0, BLOCK_KEYS)
        inside = key < stop
        at = tl.cast(begin, tl.int64)
        k_tile = _load_tile(k + at * stride_kj, inside, stride_kj, stride_kd, WIDTH, BLOCK_WIDTH)
        v_tile = _load_tile(
            v + at * stride_vj, inside, stride_vj, stride_vd, VALUE_WIDTH, BLOCK_VALUE_WIDTH
        )
        # [BLOCK_KEYS, BLOCK_ROWS]
        softened = tl.zeros([BLOCK_KEYS, BLOCK_ROWS], tl.float32)
        softened = product(k_tile, tl.trans(q_tile), softened, PRECISION, NATIVE) * -2.0
        if key_radius_sq is None:
            k_float = k_tile.to(tl.float32)
            lengths = tl.sum(k_float * k_float, 1)[:, None] + query_sq[None, :]
            softened += lengths
        else:
            softened += query_sq[None, :]
        softened = tl.maximum(softened, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if CURVED:
            softened = curved(softened, kappa, horizon, NATIVE)
        elif TELLS and key_radius_sq is None:
            softened = told_apart(softened, 0.0, lengths)
        softened += softening[None, :]
        pair = inside[:, None] & real[None, :]
        term = 1.0
        if HAS_B:
            terms = key_term + batch * stride_tb + head[None, :] * stride_th
            term = tl.load(terms + key[:, None] * stride_tj, mask=pair, other=0.0).to(tl.float32)
        if GENERAL:
            score = general_scores(
                softened, softening[None, :], scale[None, :], query_factor[None, :], term, bias,
                radius_sq, cutoff_width, ceiling, LAW, HAS_A, HAS_B, head_bias is not None,
                REPULSIVE, CAP, CUTOFF, NATIVE,
            )  # fmt: skip
        else:
            if FORCE:
                score = scale[None, :] * reciprocal(softened, NATIVE)
            else:
                score = -scale[None, :] * logarithm(softened, NATIVE)
            if HAS_B:
                score = score * term if FORCE else score + term
            if CAP != "none":
                score, _ = capped(score, ceiling, CAP)
                score *= LOG2E
        visible = (key[:, None] >= first[None, :]) & (key[:, None] < last[None, :])
        if mask is not None:
            entries = mask + batch * stride_mb + head[None, :] * stride_mh
            entries += query[None, :] * stride_mi + key[:, None].to(tl.int64) * stride_mj
            entry = tl.load(entries, mask=pair, other=0)
            if BOOL_MASK:
                visible = visible & (entry != 0)
            else:
                added = entry.to(tl.float32)
                visible = visible & (added > hidden_below)
                score += tl.where(visible, added, 0.0) * LOG2E
        if EXCLUDE_SELF:
            position = query + (keys - QUERIES)
            score = tl.where(key[:, None] == position[None, :], EXCLUDED, score)
        if CUTOFF == "hard":
            # What is no number is not beyond.
            score = tl.where(softened - softening[None, :] > radius_sq, float("-inf"), score)
        score = tl.where(visible, score, float("-inf"))

        higher = tl.maximum(maximum, tl.max(score, 0))
        # Rows that have seen no key yet: -inf - 0 instead of -inf - -inf.
        origin = tl.where(higher == float("-inf"), 0.0, higher)
        weight = power_of_two(score - origin[None, :], NATIVE)
        decay = power_of_two(maximum - origin, NATIVE)
        total = total * decay[None, :] + weight
        weight = weight.to(v_tile.dtype)
        sums = product(tl.trans(v_tile), weight, sums * decay[None, :], PRECISION, NATIVE)
        maximum = higher

    row_total = tl.sum(total, 0)
    sums = tl.trans(sums)
    column = tl.arange(0, BLOCK_VALUE_WIDTH)[None, :]
    written = real[:, None] & (column < VALUE_WIDTH)
    slot = program.to(tl.int64) * ROWS + row
    if sink is not None:
        extra = tl.load(sink + slot, mask=real, other=float("-inf")) * LOG2E
        maximum, row_total, decay = add_sink(maximum, row_total, extra, NATIVE)
        sums *= decay[:, None]
    if MERGED:
        tl.store(stats + slot * 2, maximum, mask=real)
        tl.store(stats + slot * 2 + 1, row_total, mask=real)
    else:
        sums /= tl.where(row_total == 0.0, 1.0, row_total)[:, None]
    tl.store(partial + slot[:, None] * VALUE_WIDTH + column, sums, mask=written)


@triton.jit(do_not_specialize=["splits"])
def _merge_kernel(
    partial, stats, sink, out, splits,
    ROWS: tl.constexpr, VALUE_WIDTH: tl.constexpr, BLOCK_VALUE_WIDTH: tl.constexpr,
    NATIVE: tl.constexpr,
):  # fmt: skip
    """One row of the output from its splits, in their order."""
    index = tl.program_id(0).to(tl.int64)
    tile = index // ROWS
    column = tl.arange(0, BLOCK_VALUE_WIDTH)
    existing = column < VALUE_WIDTH
    maximum = float("-inf")
    total = 0.0
    sums = tl.zeros([BLOCK_VALUE_WIDTH], tl.float32)
    for begin in range(0, splits, MERGED_AT_ONCE):
        split = begin + tl.arange(0, MERGED_AT_ONCE)
        present = split < splits
        slot = (tile * splits + split) * ROWS + index % ROWS
        split_maximum = tl.load(stats + slot * 2, mask=present, other=float("-inf"))
        split_total = tl.load(stats + slot * 2 + 1, mask=present, other=0.0)
        # [MERGED_AT_ONCE, BLOCK_VALUE_WIDTH]
        split_sums = tl.load(
            partial + slot[:, None] * VALUE_WIDTH + column[None, :],
            mask=present[:, None] & existing[None, :],
            other=0.0,
        )
        higher = tl.maximum(maximum, tl.max(split_maximum, 0))
        origin = tl.where(higher == float("-inf"), 0.0, higher)
        factor = tl.exp2(split_maximum - origin)
        decay = tl.exp2(maximum - origin)
        total = total * decay + tl.sum(split_total * factor, 0)
        sums = sums * decay + tl.sum(split_sums * factor[:, None], 0)
        maximum = higher
    if sink is not None:
        maximum, total, decay = add_sink(maximum, total, tl.load(sink + index) * LOG2E, NATIVE)
        sums *= decay
    sums /= tl.where(total == 0.0, 1.0, total)
    tl.store(out + index * VALUE_WIDTH + column, sums, mask=existing)
