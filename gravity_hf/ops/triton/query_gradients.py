"""dL/dq and dL/d(query mass); the sums that strength, softening, radii and bias need; and `delta`,
which the other backward kernels read.

A program has BLOCK_M rows of one head and goes over the keys that they see.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .forward import tile_of
from .gradients import (
    Inputs,
    exact,
    narrow,
    pair_gradients,
    plain_factor,
    weights_again,
)
from .launch import Launch, remembered
from .problem import Problem, tiles, vectors
from .reach import reach_arguments
from .score import (
    LN2,
    LOG2E,
    column_keys,
    drawn,
    inner_product,
    kept,
    power_of_two,
    product,
    scaled_sum,
    unit_of,
    vector_product,
)
from .vectors import load_vectors, vectors_row
from .visible import (
    key_span,
    load_ranges,
)

# Planes of the sums of tiles.
STRENGTH = tl.constexpr(0)
SOFTENING = tl.constexpr(1)
DISTANCE = tl.constexpr(2)
BIAS = tl.constexpr(3)
RADIUS = tl.constexpr(4)
SUMS_OF_TILES = 5


# fmt: off
@triton.jit
def attend_keys(
    grad_q, distance_sum, strength_sum, weight_sum, softening_sum, exact_sum, score_mean,
    slope_mean, a_sum, a_mean, bias_sum, bias_mean, radius_sum, radius_mean, low, high, order, q,
    grad_out, lse, rest, delta, k_desc, v_desc, key_sq, batch, head, kv_head, batch_head, norm_row,
    rows, query_term, slope, floor, unit, strength, eps, a, key_term, bias, radius_sq, width,
    ceiling, kappa, horizon, table, table_batch, table_stride, start, stop, shift, window, queries,
    keys, mask, mask_b, mask_h, mask_row, mask_column, mask_lowest, row_key, dropout,
    LAW: tl.constexpr, PLAIN: tl.constexpr, LIFTED: tl.constexpr, HAS_A: tl.constexpr,
    HAS_B: tl.constexpr, HAS_BIAS: tl.constexpr, REPULSIVE: tl.constexpr, CAP: tl.constexpr,
    CURVED: tl.constexpr, CUTOFF: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    RANGES: tl.constexpr, MASK: tl.constexpr, EXCLUDE_SELF: tl.constexpr, DROPOUT: tl.constexpr,
    SHARED: tl.constexpr, SKIPS: tl.constexpr, SUMS: tl.constexpr, MASKED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr, NATIVE: tl.constexpr, EXACT: tl.constexpr,
):
    STEP: tl.constexpr = 1 if SKIPS else BLOCK_N
    for place in tl.range(low, high, STEP):
        first = place
        if SKIPS:
            first = tl.load(order + place) * BLOCK_N
        first = tl.multiple_of(first, BLOCK_N)
        columns = first + tl.arange(0, BLOCK_N)
        zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        term = query_term[:, None]
        if LAW == "table":
            inside = (rows[:, None] < queries) & (columns[None, :] < keys)
            at = table + batch.to(tl.int64) * table_batch
            at = at + rows[:, None].to(tl.int64) * table_stride + columns[None, :]
            inner = tl.load(at, mask=inside, other=1.0)
            k = zeros
        else:
            if not LIFTED:
                norm = key_sq.load([norm_row, first]).reshape(BLOCK_N)
                term = scaled_sum(norm[None, :], 1.0 / unit, term, BLOCK_M, BLOCK_N)
            k = load_vectors(k_desc, batch, kv_head, first, SHARED, BLOCK_N, BLOCK_D)
            inner = inner_product(q, k, zeros, PRECISION, NATIVE)
        v = v_desc.load([batch, kv_head, first, 0]).reshape(BLOCK_N, BLOCK_V)
        grad_weight = product(grad_out, v.T, zeros, PRECISION, NATIVE)
        b = 1.0
        if HAS_B:
            b = key_term.load([batch_head, first]).reshape(1, BLOCK_N)
        softened, score, weight, bend = weights_again(
            inner, term, lse[:, None], rest, rows[:, None], columns[None, :], columns[None, :],
            start[:, None], stop[:, None], batch, head, slope, floor, eps, strength, a, b, bias,
            radius_sq, width, ceiling, kappa, horizon, shift, window, queries, keys, mask, mask_b,
            mask_h, mask_row, mask_column, mask_lowest, LAW, PLAIN, LIFTED, HAS_A, HAS_B, HAS_BIAS,
            REPULSIVE, CAP, CURVED, CUTOFF, CAUSAL, WINDOW, RANGES, MASK, EXCLUDE_SELF, MASKED,
            NATIVE, EXACT,
        )
        if DROPOUT:
            column_key, upper = column_keys(first, BLOCK_N)
            draw = drawn(row_key[:, None], column_key[None, :], upper[None, :])
            grad_weight = kept(grad_weight, draw, dropout, NATIVE) * (1.0 / (1.0 - dropout))
        grad_weight -= delta[:, None]
        c = weight * grad_weight
        distance, g, d_n, d_strength, d_a, d_b, d_bias, d_radius = pair_gradients(
            c, weight, grad_weight, score, softened, bend, eps, floor, strength, a, b,
            bias, radius_sq, width, ceiling, kappa, horizon, LAW, PLAIN, LIFTED, HAS_A, HAS_B,
            HAS_BIAS, REPULSIVE, CAP, CURVED, CUTOFF, NATIVE,
        )
        if LAW != "table":
            rounded, undo = narrow(distance, v.dtype, SCALED)
            # Every column of the sixteen is the row's sum of what the product above it multiplies,
            # and tensor cores add it up for less than the other units would.
            ones = tl.full([BLOCK_N, 16], 1.0, v.dtype)
            if SCALED:
                part_sum = product(rounded, ones, tl.zeros_like(distance_sum), PRECISION, NATIVE)
                distance_sum += part_sum * undo
            else:
                distance_sum = product(rounded, ones, distance_sum, PRECISION, NATIVE)
            if SCALED:
                part_sum = vector_product(
                    rounded, k, tl.zeros_like(grad_q), PRECISION, NATIVE
                )
                grad_q += part_sum * undo
            else:
                grad_q = vector_product(rounded, k, grad_q, PRECISION, NATIVE)
        if not PLAIN or HAS_B or SUMS > 0:
            weight_sum += tl.sum(c, 1)
        if SUMS > 0:
            if SUMS == 2:
                softening_sum += tl.sum(g, 1)
                if LIFTED:
                    exact_sum += tl.sum(distance, 1)
            if PLAIN:
                strength_sum += tl.sum(c * score, 1)
                score_mean += tl.sum(weight * score, 1)
                if SUMS == 2:
                    slope_mean += tl.sum(weight * d_n, 1)
            else:
                strength_sum += tl.sum(d_strength * grad_weight, 1)
                score_mean += tl.sum(d_strength, 1)
                if SUMS == 2:
                    slope_mean += tl.sum(d_n, 1)
            if HAS_A:
                a_sum += tl.sum(d_a * grad_weight, 1)
                a_mean += tl.sum(d_a, 1)
            if HAS_BIAS:
                bias_sum += tl.sum(d_bias * grad_weight, 1)
                bias_mean += tl.sum(d_bias, 1)
            if CUTOFF != "none":
                radius_sum += tl.sum(d_radius * grad_weight, 1)
                radius_mean += tl.sum(d_radius, 1)
    return (
        grad_q, distance_sum, strength_sum, weight_sum, softening_sum, exact_sum, score_mean,
        slope_mean, a_sum, a_mean, bias_sum, bias_mean, radius_sum, radius_mean,
    )


@triton.jit
def output_times_gradient(
    out, stride_b, stride_h, stride_row, batch, head, rows, row_valid, grad_out, value_width,
    BLOCK_V: tl.constexpr,
):
    """`delta_i = G_o,i . o_i`, 0 where there is no row."""
    columns = tl.arange(0, BLOCK_V)[None, :]
    at = out + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    at = at + rows[:, None].to(tl.int64) * stride_row + columns
    o = tl.load(at, mask=row_valid[:, None] & (columns < value_width), other=0.0)
    return tl.sum(o.to(tl.float32) * grad_out.to(tl.float32), 1)


@triton.jit
def store_sum(at, value, row_valid):
    """Of a tile's rows."""
    tl.store(at, tl.sum(tl.where(row_valid, value, 0.0), 0))


# A single key, taken for a constant, is a program that ptxas 12.8 crashes on.
@triton.jit(do_not_specialize=["keys"])
def query_kernel(
    q_desc, k_desc, v_desc, grad_desc, key_sq, saved, out, delta_at, grad_query, grad_mass, sums,
    strength, eps, key_radius_sq, query_mass, key_term, head_bias, radius, table, sink, grad_sink,
    table_batch, table_stride, width, ceiling, kappa, horizon, ranges, ranges_b, ranges_row, mask,
    mask_b, mask_h, mask_row, mask_column, mask_lowest, dropout, out_b, out_h, out_row, query_b,
    query_h, query_row, batches, heads, kv_heads, queries, keys, shift, window, head_width,
    value_width, padded, sums_plane, saved_plane, heads_together, order, counts, listed,
    LAW: tl.constexpr, PLAIN: tl.constexpr, LIFTED: tl.constexpr, HAS_A: tl.constexpr,
    HAS_B: tl.constexpr, HAS_BIAS: tl.constexpr, REPULSIVE: tl.constexpr, CAP: tl.constexpr,
    CURVED: tl.constexpr, CUTOFF: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    RANGES: tl.constexpr, MASK: tl.constexpr, EXCLUDE_SELF: tl.constexpr, DROPOUT: tl.constexpr,
    SHARED: tl.constexpr, SKIPS: tl.constexpr, HAS_SINK: tl.constexpr, SUMS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr, NATIVE: tl.constexpr, EXACT: tl.constexpr,
):
    blocks = tl.cdiv(queries, BLOCK_M)
    block, batch_head = tile_of(tl.program_id(0), blocks, batches * heads, heads_together)
    batch, head = batch_head // heads, batch_head % heads
    kv_head = head // (heads // kv_heads)
    norm_row = vectors_row(batch, kv_head, kv_heads, SHARED)
    first_row = block * BLOCK_M
    rows = first_row + tl.arange(0, BLOCK_M)
    row_valid = rows < queries

    head_strength = tl.load(strength + head)
    head_eps = 0.0
    unit = 1.0
    factor = 1.0
    radius_sq = 0.0
    bias = 0.0
    floor = 0.0
    if LAW != "table":
        head_eps = tl.load(eps + head)
    if PLAIN:
        unit = unit_of(head_strength, head_eps, LAW == "power", BLOCK_D)
        factor = plain_factor(head_strength, unit, LAW == "power")
    if not CURVED:
        floor = head_eps / unit
    if CUTOFF != "none":
        radius_sq = tl.load(radius + head)
        radius_sq = radius_sq * radius_sq
    if HAS_BIAS:
        bias = tl.load(head_bias + head)
    a = 1.0
    if HAS_A:
        at = query_mass + batch_head.to(tl.int64) * queries + rows
        a = tl.load(at, mask=row_valid, other=1.0)[:, None]
    per_row = batch_head.to(tl.int64) * padded + rows
    lse = tl.load(saved + per_row, mask=row_valid, other=float("inf"))
    rest = 0.0
    if EXACT:
        rest = tl.load(saved + saved_plane + per_row, mask=row_valid, other=0.0)[:, None]

    query_term = tl.zeros([BLOCK_M], tl.float32)
    if LAW == "table":
        q = 0.0
    else:
        q = load_vectors(q_desc, batch, head, first_row, SHARED, BLOCK_M, BLOCK_D)
        at = saved + 2 * saved_plane + per_row
        query_term = tl.load(at, mask=row_valid, other=0.0)
        if not CURVED:
            query_term += head_eps
        if LIFTED:
            query_term += tl.load(key_radius_sq + kv_head)
        query_term = query_term * (1.0 / unit)
    grad_out = grad_desc.load([batch, head, first_row, 0]).reshape(BLOCK_M, BLOCK_V)
    delta = output_times_gradient(
        out, out_b, out_h, out_row, batch, head, rows, row_valid, grad_out, value_width, BLOCK_V
    )

    row_key = 0
    if DROPOUT:
        at = saved + 3 * saved_plane + per_row
        row_key = tl.load(at, mask=row_valid, other=0.0).to(tl.uint32, bitcast=True)
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
    grad_q = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    zero = tl.zeros([BLOCK_M], tl.float32)
    distance_sum = tl.zeros([BLOCK_M, 16], tl.float32)
    strength_sum, weight_sum, softening_sum = zero, zero, zero
    exact_sum, a_sum, bias_sum, radius_sum = zero, zero, zero, zero
    score_mean, slope_mean, a_mean, bias_mean, radius_mean = zero, zero, zero, zero, zero
    for part in tl.static_range(3):
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
            (
                grad_q, distance_sum, strength_sum, weight_sum, softening_sum, exact_sum,
                score_mean, slope_mean, a_sum, a_mean, bias_sum, bias_mean, radius_sum, radius_mean,
            ) = attend_keys(
                grad_q, distance_sum, strength_sum, weight_sum, softening_sum, exact_sum,
                score_mean, slope_mean, a_sum, a_mean, bias_sum, bias_mean, radius_sum, radius_mean,
                part_low, part_high, order, q, grad_out, lse, rest, delta, k_desc, v_desc, key_sq,
                batch, head, kv_head, batch_head, norm_row, rows, query_term, -2.0 / unit, floor,
                unit, head_strength, head_eps, a, key_term, bias, radius_sq, width, ceiling, kappa,
                horizon, table, table_batch, table_stride, start, stop, shift, window, queries,
                keys, mask, mask_b, mask_h, mask_row, mask_column, mask_lowest, row_key, dropout,
                LAW, PLAIN, LIFTED, HAS_A, HAS_B, HAS_BIAS, REPULSIVE, CAP, CURVED, CUTOFF, CAUSAL,
                WINDOW, RANGES, MASK, EXCLUDE_SELF, DROPOUT, SHARED, SKIPS, SUMS, part != 1,
                BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_V, SCALED, PRECISION, NATIVE, EXACT,
            )
    if LAW != "table":
        near_sum = tl.sum(distance_sum, 1) * (1.0 / 16)
        grad_q = 2.0 * factor * (near_sum[:, None] * q.to(tl.float32) - grad_q)
        columns = tl.arange(0, BLOCK_D)
        at = grad_query + batch.to(tl.int64) * query_b + head.to(tl.int64) * query_h
        at = at + rows[:, None].to(tl.int64) * query_row + columns[None, :]
        inside = row_valid[:, None] & (columns[None, :] < head_width)
        tl.store(at, grad_q.to(grad_query.dtype.element_ty), mask=inside)
    if HAS_SINK:
        at = batch_head.to(tl.int64) * queries + rows
        exponent = tl.load(sink + at, mask=row_valid, other=-float("inf")) * LOG2E - lse
        if EXACT:
            exponent += tl.load(saved + saved_plane + per_row, mask=row_valid, other=0.0)
        sink_weight = power_of_two(exponent, NATIVE)
        # c of all keys and the sink adds up to 0, but for the rounding of delta: what is left.
        weight_sum -= sink_weight * delta
        exact_delta = delta
        if SUMS > 0 and PLAIN:
            exact_delta += weight_sum
        tl.store(grad_sink + at, -sink_weight * exact_delta, mask=row_valid)
    # For the kernels that follow, in rows of padding, too.
    total = delta
    if not PLAIN or HAS_B:
        # `weight_sum` is what rounding of the output left in it.
        total += weight_sum
    tl.store(delta_at + per_row, tl.where(row_valid, total, 0.0), mask=rows < padded)
    if SUMS > 0:
        at = sums + batch_head.to(tl.int64) * blocks + block
        # sum c is 0 but for the rounding of delta. Its part in the sums would drown them where
        # scores hardly differ, so it is taken out with the row's means.
        strength_sum -= weight_sum * score_mean
        softening_sum -= weight_sum * slope_mean
        if HAS_A:
            a_sum -= weight_sum * a_mean
        if HAS_BIAS:
            bias_sum -= weight_sum * bias_mean
        if CUTOFF != "none":
            radius_sum -= weight_sum * radius_mean
        if PLAIN:
            exact_sum -= weight_sum * slope_mean
            # dscore/dM^2 is score / M^2; unit is M^2 log2 e, or a stand-in where M is 0.
            if LAW == "power":
                strength_sum = strength_sum * LN2 / tl.maximum(head_strength, 1e-30)
            else:
                strength_sum = strength_sum / unit
        store_sum(at + STRENGTH * sums_plane, strength_sum, row_valid)
        if SUMS == 2:
            store_sum(at + SOFTENING * sums_plane, softening_sum * factor, row_valid)
        if LIFTED and SUMS == 2:
            store_sum(at + DISTANCE * sums_plane, exact_sum * factor, row_valid)
        if HAS_A:
            per_row = batch_head.to(tl.int64) * queries + rows
            tl.store(grad_mass + per_row, a_sum, mask=row_valid)
        if HAS_BIAS:
            store_sum(at + BIAS * sums_plane, bias_sum, row_valid)
        if CUTOFF != "none":
            store_sum(at + RADIUS * sums_plane, radius_sum, row_valid)


# fmt: on


class QueryGradients(NamedTuple):
    """`sums` `[SUMS_OF_TILES, B, H, tiles of rows]`; what is asked for, else None."""

    q: Tensor | None
    query_mass: Tensor | None
    sink: Tensor | None
    sums: Tensor | None


def query_gradients(
    problem: Problem, out: Tensor, inputs: Inputs, sums: int, sizes: dict | None = None
) -> QueryGradients:
    """Also fills `inputs.delta`. `out`: of the forward; `sums`: see `backward.backward`."""
    form, v = problem.form, inputs.v
    sizes = sizes or form.tiles["query"]
    rows, columns = sizes["BLOCK_M"], sizes["BLOCK_N"]
    v_tiles = tiles(v, columns, form.widths.width_v)
    grad_q = grad_mass = grad_sink = of_tiles = None
    q_tiles = k_tiles = key_sq = v_tiles
    if inputs.q is not None:
        grad_q = torch.empty_like(problem.q)
        q_tiles = tiles(inputs.q, rows, form.widths.width_k)
        k_tiles = tiles(inputs.k, columns, form.widths.width_k)
        if inputs.norms is not None:
            key_sq = vectors(inputs.norms, columns)
    if sums > 0:
        shape = (SUMS_OF_TILES, problem.batch, problem.heads, triton.cdiv(problem.queries, rows))
        of_tiles = torch.empty(shape, dtype=torch.float32, device=v.device)
        if problem.query_mass is not None:
            grad_mass = torch.empty(problem.query_mass.shape, dtype=torch.float32, device=v.device)
    if problem.sink is not None:
        grad_sink = torch.empty_like(problem.sink)
    target = v if grad_q is None else grad_q
    order, counts, reach = reach_arguments(problem, rows, columns)
    key = ("query", sums, target.stride(), out.stride(), *sizes.values(), *reach.values())
    more = {"SUMS": sums, **sizes, **reach}
    remembered(form.launches, key, lambda: _launch(problem, inputs.saved, out, target, more))(
        q_desc=q_tiles,
        k_desc=k_tiles,
        v_desc=v_tiles,
        grad_desc=tiles(inputs.grad, rows, form.widths.width_v),
        key_sq=key_sq,
        saved=inputs.saved,
        out=out,
        delta_at=inputs.delta,
        grad_query=target,
        grad_mass=inputs.saved if grad_mass is None else grad_mass,
        grad_sink=inputs.saved if grad_sink is None else grad_sink,
        sums=inputs.saved if of_tiles is None else of_tiles,
        order=order,
        counts=counts,
        **problem.tensors_by_row(columns),
    )
    return QueryGradients(grad_q, grad_mass, grad_sink, of_tiles)


def _launch(problem: Problem, saved: Tensor, out: Tensor, target: Tensor, more: dict) -> Launch:
    form = problem.form
    blocks = triton.cdiv(problem.queries, more["BLOCK_M"])
    return Launch(
        query_kernel,
        (blocks * problem.batch * problem.heads,),
        saved_plane=saved.stride(0),
        out_b=out.stride(0),
        out_h=out.stride(1),
        out_row=out.stride(2),
        query_b=target.stride(0),
        query_h=target.stride(1),
        query_row=target.stride(2),
        head_width=problem.width_k,
        value_width=problem.width_v,
        padded=saved.shape[3],
        sums_plane=problem.batch * problem.heads * blocks,
        heads_together=problem.heads_together(),
        HAS_SINK=problem.sink is not None,
        SCALED=problem.v.dtype == torch.float16,
        BLOCK_D=form.widths.width_k,
        BLOCK_V=form.widths.width_v,
        EXACT=exact(problem),
        **form.numbers,
        **more,
    )
