"""The forward kernel: one program computes BLOCK_M rows of the output of one head.

Two codes for the softmax. *Bounded*: the law bounds every score of a row from both sides
(`plain_bounds`); where the two bounds of every row in the tile are within BOUNDED_SPAN powers of
two, weights relative to their middle can neither overflow nor vanish, and no running maximum is
kept. *Online*: elsewhere, and for laws without bounds. Each program chooses from its head's
parameters and its rows' norms, so the host never waits for the device.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import Launch, remembered
from .problem import Form, Problem, aligned, block_of, tiles, vectors
from .reach import reach_arguments
from .score import (
    EXCLUDED,
    LOG2E,
    add_sink,
    column_keys,
    curved,
    drawn,
    general_scores,
    inner_product,
    kept,
    logarithm,
    plain_scores,
    power_of_two,
    product,
    reciprocal,
    row_keys,
    scaled_sum,
    told_apart,
    unit_of,
)
from .vectors import load_vectors, vectors_row
from .visible import key_span, load_mask, load_ranges, visible_pairs

# Planes of what the backward reads, without dropout.
SAVED = 3
# Weights up to 2^80: sums of 2^20 keys times values of 2^20 still fit float32.
BOUNDED_SPAN = tl.constexpr(160.0)


# fmt: off
@triton.jit
def squared_norms_kernel(
    k, norms, padded, keys, stride_b, stride_h, stride_row, kv_heads, width, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """`|k_j|^2` `[B, Hkv, Tk]` in float32."""
    batch_head = tl.program_id(0)
    batch, head = batch_head // kv_heads, batch_head % kv_heads
    rows = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, BLOCK_D)
    at = k + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    at = at + rows[:, None].to(tl.int64) * stride_row + columns[None, :]
    inside = (rows[:, None] < keys) & (columns[None, :] < width)
    value = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    tl.store(
        norms + batch_head.to(tl.int64) * padded + rows, tl.sum(value * value, 1), mask=rows < keys
    )


@triton.jit
def plain_bounds(
    query_sq, key_sq_max, unit, strength, eps, POWER: tl.constexpr, NATIVE: tl.constexpr,
):
    """Lowest and highest score that a row can have, from norms. Keys longer than `key_sq_max`
    (lifted keys can be) lower the first, never raise the second."""
    reach = tl.sqrt(query_sq) + tl.sqrt(key_sq_max)
    farthest = (reach * reach + eps) / unit
    if POWER:
        return -strength * logarithm(farthest, NATIVE), -strength * logarithm(eps / unit, NATIVE)
    else:
        return reciprocal(farthest, NATIVE), unit / eps


@triton.jit
def tile_of(pid, blocks, batch_heads, heads_together):
    """Which block of rows and which head. Heads go in groups whose keys and values fit the cache;
    within a group the last rows go first, as causal programs for them take longest."""
    group_size = heads_together * blocks
    group = pid // group_size
    first = group * heads_together
    together = tl.minimum(batch_heads - first, heads_together)
    inside = pid % group_size
    return blocks - 1 - inside // together, first + inside % together


@triton.jit
def attend_tiles(
    acc, total, peak, low, high, order, q, k_desc, v_desc, batch, head, kv_head, batch_head,
    norm_row, rows, query_term, offset, slope, floor, strength, eps, key_sq, key_scale, a, key_term,
    bias, radius_sq, width, ceiling, kappa, horizon, table, table_batch, table_stride, start, stop,
    shift, window, queries, keys, mask, mask_b, mask_h, mask_row, mask_column, mask_lowest, row_key,
    dropout, LAW: tl.constexpr, PLAIN: tl.constexpr, LIFTED: tl.constexpr, HAS_A: tl.constexpr,
    HAS_B: tl.constexpr, HAS_BIAS: tl.constexpr, REPULSIVE: tl.constexpr, CAP: tl.constexpr,
    CURVED: tl.constexpr, CUTOFF: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    RANGES: tl.constexpr, MASK: tl.constexpr, EXCLUDE_SELF: tl.constexpr, DROPOUT: tl.constexpr,
    MASKED: tl.constexpr, SHARED: tl.constexpr, SKIPS: tl.constexpr, ONLINE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr, NATIVE: tl.constexpr,
):
    """Adds keys `low .. high` to the running sums of a tile of rows. SKIPS: `low .. high` are
    places in `order`, a list of tiles."""
    STEP: tl.constexpr = 1 if SKIPS else BLOCK_N
    for place in tl.range(low, high, STEP):
        first = place
        if SKIPS:
            first = tl.load(order + place) * BLOCK_N
        first = tl.multiple_of(first, BLOCK_N)
        columns = first + tl.arange(0, BLOCK_N)
        if LAW == "table":
            inside = (rows[:, None] < queries) & (columns[None, :] < keys)
            at = table + batch.to(tl.int64) * table_batch
            at = at + rows[:, None].to(tl.int64) * table_stride + columns[None, :]
            softened = tl.load(at, mask=inside, other=1.0).to(tl.float32)
        else:
            if not LIFTED:
                norm = key_sq.load([norm_row, first]).reshape(BLOCK_N)
            k = load_vectors(k_desc, batch, kv_head, first, SHARED, BLOCK_N, BLOCK_D)
            zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            inner = inner_product(q, k, zeros, PRECISION, NATIVE)
            if LIFTED:
                softened = inner * slope + query_term[:, None]
            else:
                term = scaled_sum(
                    norm[None, :], key_scale, query_term[:, None], BLOCK_M, BLOCK_N
                )
                softened = inner * slope + term
            softened = tl.maximum(softened, floor, propagate_nan=tl.PropagateNan.ALL)
            if not PLAIN and not LIFTED and not CURVED:
                softened = told_apart(softened, floor, term)
            if CURVED:
                softened = curved(softened, kappa, horizon, NATIVE) + eps
        b = 1.0
        if HAS_B:
            b = key_term.load([batch_head, first]).reshape(1, BLOCK_N)
        if PLAIN:
            score = plain_scores(softened, strength, LAW == "power", NATIVE)
            if HAS_B:
                score += b
        else:
            score = general_scores(
                softened, eps, strength, a, b, bias, radius_sq, width, ceiling, LAW, HAS_A, HAS_B,
                HAS_BIAS, REPULSIVE, CAP, CUTOFF, NATIVE,
            )
        if MASKED:
            seen = visible_pairs(
                rows[:, None], columns[None, :], columns[None, :], start[:, None], stop[:, None],
                shift, window, keys, CAUSAL, WINDOW, RANGES,
            )
            if MASK != "none":
                seen, added = load_mask(
                    mask, batch, head, rows[:, None], columns[None, :], seen, queries, keys, mask_b,
                    mask_h, mask_row, mask_column, mask_lowest, MASK,
                )
                if MASK == "float":
                    score += added * LOG2E
        if EXCLUDE_SELF and MASKED:
            score = tl.where(columns[None, :] == rows[:, None] + shift, EXCLUDED, score)
        if CUTOFF == "hard":
            # What is no number is not beyond.
            score = tl.where(softened - eps > radius_sq, -float("inf"), score)
        if MASKED and ONLINE:
            score = tl.where(seen, score, -float("inf"))
        if ONLINE:
            highest = tl.maximum(peak, tl.max(score, 1))
            # A row that has seen nothing yet: any finite number will do.
            base = tl.where(highest == -float("inf"), 0.0, highest)
            shrink = power_of_two(peak - base, NATIVE)
            weight = power_of_two(score - base[:, None], NATIVE)
            total *= shrink
            acc *= shrink[:, None]
            peak = highest
        else:
            weight = power_of_two(score - offset[:, None], NATIVE)
            if MASKED:
                weight = tl.where(seen, weight, 0.0)
        total += tl.sum(weight, 1)
        if DROPOUT:
            column_key, upper = column_keys(first, BLOCK_N)
            draw = drawn(row_key[:, None], column_key[None, :], upper[None, :])
            weight = kept(weight, draw, dropout, NATIVE)
        v = v_desc.load([batch, kv_head, first, 0]).reshape(BLOCK_N, BLOCK_V)
        acc = product(weight.to(v.dtype), v, acc, PRECISION, NATIVE)
    return acc, total, peak


@triton.jit
def forward_kernel(
    q_desc, k_desc, v_desc, out, saved, strength, eps, key_radius_sq, key_sq, key_sq_max,
    query_mass, key_term, head_bias, radius, table, sink, table_batch, table_stride, width, ceiling,
    kappa, horizon, ranges, ranges_b, ranges_row, mask, mask_b, mask_h, mask_row, mask_column,
    mask_lowest, seed_at, dropout, out_b, out_h, out_row, batches, heads, kv_heads, queries, keys,
    shift, window, value_width, padded, saved_plane, heads_together, order, counts, listed,
    LAW: tl.constexpr, PLAIN: tl.constexpr, BOUNDABLE: tl.constexpr, LIFTED: tl.constexpr,
    HAS_A: tl.constexpr, HAS_B: tl.constexpr, HAS_BIAS: tl.constexpr, REPULSIVE: tl.constexpr,
    CAP: tl.constexpr, CURVED: tl.constexpr, CUTOFF: tl.constexpr, CAUSAL: tl.constexpr,
    WINDOW: tl.constexpr, RANGES: tl.constexpr, MASK: tl.constexpr, EXCLUDE_SELF: tl.constexpr,
    DROPOUT: tl.constexpr, SHARED: tl.constexpr, SKIPS: tl.constexpr, HAS_SINK: tl.constexpr,
    SAVE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, PRECISION: tl.constexpr, NATIVE: tl.constexpr,
):
    blocks = tl.cdiv(queries, BLOCK_M)
    block, batch_head = tile_of(tl.program_id(0), blocks, batches * heads, heads_together)
    batch, head = batch_head // heads, batch_head % heads
    kv_head = head // (heads // kv_heads)
    norm_row = vectors_row(batch, kv_head, kv_heads, SHARED)
    first_row = block * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    row_valid = rows < queries
    per_row = batch_head.to(tl.int64) * queries + rows
    padded_row = batch_head.to(tl.int64) * padded + rows

    head_strength = tl.load(strength + head)
    head_eps = 0.0
    unit = 1.0
    radius_sq = 0.0
    bias = 0.0
    if LAW != "table":
        head_eps = tl.load(eps + head)
    if PLAIN:
        unit = unit_of(head_strength, head_eps, LAW == "power", BLOCK_D)
    if CUTOFF != "none":
        radius_sq = tl.load(radius + head)
        radius_sq = radius_sq * radius_sq
    if HAS_BIAS:
        bias = tl.load(head_bias + head)
    a = 1.0
    if HAS_A:
        a = tl.load(query_mass + per_row, mask=row_valid, other=1.0)[:, None]

    offset = tl.zeros([BLOCK_M], tl.float32)
    query_sq = tl.zeros([BLOCK_M], tl.float32)
    query_term = query_sq
    floor = head_eps / unit
    if CURVED:
        floor = 0.0
    bounded = 0
    if LAW == "table":
        q = 0.0
    else:
        q = load_vectors(q_desc, batch, head, first_row, SHARED, BLOCK_M, BLOCK_D)
        wide = q.to(tl.float32)
        query_sq = tl.sum(wide * wide, 1)
        query_term = query_sq
        if not CURVED:
            query_term += head_eps
        longest = 0.0
        if LIFTED:
            longest = tl.load(key_radius_sq + kv_head)
            query_term += longest
        else:
            if BOUNDABLE and LAW == "power":
                longest = tl.load(key_sq_max + norm_row)
        query_term = query_term * (1.0 / unit)
        if BOUNDABLE:
            lowest, top = plain_bounds(
                query_sq, longest, unit, head_strength, head_eps, LAW == "power", NATIVE
            )
            if LAW == "force" and not LIFTED:
                lowest = tl.zeros([BLOCK_M], tl.float32)
            offset = 0.5 * (lowest + top)
            span = tl.max(tl.where(row_valid, top - lowest, 0.0), 0)
            bounded = (span <= BOUNDED_SPAN).to(tl.int32)

    row_key = 0
    if DROPOUT:
        row_key = row_keys(tl.load(seed_at), per_row)
    start, stop = load_ranges(ranges, batch, rows, row_valid, ranges_b, ranges_row, RANGES)
    last_row = tl.minimum(first_row + BLOCK_M, queries) - 1
    low, full_low, full_high, high = key_span(
        first_row, last_row, start, stop, shift, window, keys, CAUSAL, WINDOW, RANGES, MASK,
        EXCLUDE_SELF, BLOCK_N,
    )
    if SKIPS:
        tile = batch_head * blocks + block
        order += tile.to(tl.int64) * listed
        listed = tl.load(counts + tile)
    acc = tl.zeros([BLOCK_M, BLOCK_V], tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    peak = tl.full([BLOCK_M], -float("inf"), tl.float32)
    for code in tl.static_range(2):
        # code 0: bounded; code 1: online.
        if code == 1 or BOUNDABLE:
            chosen = True
            if BOUNDABLE:
                chosen = bounded == 1 - code
            if chosen:
                for part in tl.static_range(3):
                    # Masked keys before those that every row sees, these, masked keys after them.
                    if part == 2 or (not SKIPS and (part == 1 or WINDOW or RANGES)):
                        part_low = low
                        part_high = full_low
                        if part == 1:
                            part_low = full_low
                            part_high = full_high
                        if part == 2:
                            part_low = full_high
                            part_high = high
                        if SKIPS:
                            part_low = 0
                            part_high = listed
                        acc, total, peak = attend_tiles(
                            acc, total, peak, part_low, part_high, order, q, k_desc, v_desc, batch,
                            head, kv_head, batch_head, norm_row, rows, query_term, offset,
                            -2.0 / unit, floor, head_strength, head_eps, key_sq, 1.0 / unit, a,
                            key_term, bias, radius_sq, width, ceiling, kappa, horizon, table,
                            table_batch, table_stride, start, stop, shift, window, queries, keys,
                            mask, mask_b, mask_h, mask_row, mask_column, mask_lowest, row_key,
                            dropout, LAW, PLAIN, LIFTED, HAS_A, HAS_B, HAS_BIAS, REPULSIVE, CAP,
                            CURVED, CUTOFF, CAUSAL, WINDOW, RANGES, MASK, EXCLUDE_SELF, DROPOUT,
                            part != 1, SHARED, SKIPS, code == 1, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V,
                            PRECISION, NATIVE,
                        )
    base = peak
    if BOUNDABLE:
        base = tl.where(bounded == 1, offset, peak)
    if HAS_SINK:
        # Last, so that weights were rounded relative to the highest key.
        extra = tl.load(sink + per_row, mask=row_valid, other=-float("inf")) * LOG2E
        base, total, shrink = add_sink(base, total, extra, NATIVE)
        acc *= shrink[:, None]
    alive = total > 0
    inverse = tl.where(alive, 1.0 / tl.where(alive, total, 1.0), 0.0)
    if DROPOUT:
        inverse *= 1.0 / (1.0 - dropout)
    acc = acc * inverse[:, None]
    columns = tl.arange(0, BLOCK_V)
    at = out + batch.to(tl.int64) * out_b + head.to(tl.int64) * out_h
    at = at + rows[:, None].to(tl.int64) * out_row + columns[None, :]
    inside = row_valid[:, None] & (columns[None, :] < value_width)
    tl.store(at, acc.to(out.dtype.element_ty), mask=inside)
    if SAVE:
        # A row that saw nothing: weights 2^(score - inf) = 0 in the backward.
        value = tl.where(alive, base + tl.log2(tl.where(alive, total, 1.0)), float("inf"))
        # Rows of padding too: what is never written may be NaN, and NaN times 0 is NaN.
        value = tl.where(row_valid, value, float("inf"))
        row_valid = rows < padded
        tl.store(saved + padded_row, value, mask=row_valid)
        rest = tl.where(alive, tl.log2(tl.where(alive, total, 1.0)) - (value - base), 0.0)
        tl.store(saved + saved_plane + padded_row, rest, mask=row_valid)
        tl.store(saved + 2 * saved_plane + padded_row, query_sq, mask=row_valid)
        if DROPOUT:
            bits = row_key.to(tl.float32, bitcast=True)
            tl.store(saved + 3 * saved_plane + padded_row, bits, mask=row_valid)


# fmt: on


def squared_norms(k: Tensor, form: Form) -> Tensor:
    """`|k_j|^2` `[B * N, Tk]` in float32, read once; no float32 copy of the keys is made. Rows are
    padded to 16 bytes, for the copy engine. `form`: that of the call, which k is `aligned` for."""
    batch, kv_heads, keys, _ = k.shape
    padded = -(-keys // 4) * 4
    norms = torch.empty(batch * kv_heads, padded, dtype=torch.float32, device=k.device)
    key = ("norms", k.shape, k.stride())
    remembered(form.launches, key, lambda: _norms_launch(k, padded))(k=k, norms=norms)
    return norms[:, :keys]


def _norms_launch(k: Tensor, padded: int) -> Launch:
    batch, kv_heads, keys, width = k.shape
    block_d = block_of(width)
    block = 64 if block_d <= 128 else 32
    return Launch(
        squared_norms_kernel,
        # The first direction of a grid is the one without a limit.
        (batch * kv_heads, triton.cdiv(keys, block)),
        padded=padded,
        keys=keys,
        stride_b=k.stride(0),
        stride_h=k.stride(1),
        stride_row=k.stride(2),
        kv_heads=kv_heads,
        width=width,
        BLOCK=block,
        BLOCK_D=block_d,
        num_warps=4,
    )


def forward(
    problem: Problem, saved: Tensor | None, sizes: dict | None = None
) -> tuple[Tensor, Tensor | None]:
    """Output `[B, H, Tq, Dv]`, laid out `[B, Tq, H, Dv]` in memory, as models go on with it; and
    the `squared_norms` of the keys where they were needed.

    Fills `saved` `[SAVED or SAVED + 1, B, H, T']` where given, `T'` being `Tq` rounded up to 4,
    with what the backward needs to compute the same weights again: the base-2 logarithm of each
    row's sum of weights, what float32 lost of it, `|q_i|^2`, and with dropout the row's bits.
    """
    form = problem.form
    v = aligned(problem.v)
    out = torch.empty_strided(*form.layout, dtype=v.dtype, device=v.device)
    sizes = sizes or form.tiles["forward"]
    rows, columns = sizes["BLOCK_M"], sizes["BLOCK_N"]
    v_tiles = tiles(v, columns, form.widths.width_v)
    key_sq, key_sq_max = v_tiles, problem.strength
    norms = None
    if problem.table is not None:
        q_tiles = k_tiles = v_tiles
    else:
        q, k = problem.queries_and_keys()
        q_tiles = tiles(q, rows, form.widths.width_k)
        k_tiles = tiles(k, columns, form.widths.width_k)
        if problem.key_radius_sq is None:
            norms = squared_norms(k, form)
            key_sq = vectors(norms, columns)
            if form.boundable and problem.law == "power":
                key_sq_max = norms.amax(-1)
    order, counts, reach = reach_arguments(problem, rows, columns)
    key = ("forward", saved is not None, *sizes.values(), *reach.values())
    remembered(form.launches, key, lambda: _launch(problem, out, saved, {**sizes, **reach}))(
        q_desc=q_tiles,
        k_desc=k_tiles,
        v_desc=v_tiles,
        out=out,
        saved=problem.strength if saved is None else saved,
        key_sq=key_sq,
        key_sq_max=key_sq_max,
        seed_at=problem.strength if problem.seed is None else problem.seed,
        order=order,
        counts=counts,
        **problem.tensors_by_row(columns),
    )
    return out, norms


def _launch(problem: Problem, out: Tensor, saved: Tensor | None, more: dict) -> Launch:
    form = problem.form
    blocks = triton.cdiv(problem.queries, more["BLOCK_M"])
    return Launch(
        forward_kernel,
        (blocks * problem.batch * problem.heads,),
        out_b=out.stride(0),
        out_h=out.stride(1),
        out_row=out.stride(2),
        value_width=problem.width_v,
        padded=0 if saved is None else saved.shape[3],
        saved_plane=0 if saved is None else saved.stride(0),
        heads_together=problem.heads_together(),
        BOUNDABLE=form.boundable,
        HAS_SINK=problem.sink is not None,
        SAVE=saved is not None,
        BLOCK_D=form.widths.width_k,
        BLOCK_V=form.widths.width_v,
        **form.numbers,
        **more,
    )
