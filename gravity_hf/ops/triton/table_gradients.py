"""dL/d(inverse distance). A program has a tile of a table and goes over batch and heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gradients import (
    Inputs,
    exact,
    pair_gradients,
    weights_again,
)
from .problem import (
    Problem,
    block_of,
    tiles,
)
from .score import (
    column_keys,
    drawn,
    kept,
    product,
)
from .tiles import table_tiles
from .visible import (
    load_ranges,
)


# fmt: off
@triton.jit
def table_kernel(
    v_desc, grad_desc, saved, saved_plane, delta_at, grad_table, strength, eps, key_radius_sq,
    query_mass, key_term, head_bias, radius, table, table_batch, table_stride, width, ceiling,
    kappa, horizon, ranges, ranges_b, ranges_row, mask, mask_b, mask_h, mask_row, mask_column,
    mask_lowest, dropout, batches, heads, kv_heads, queries, keys, shift, window, padded,
    LAW: tl.constexpr, PLAIN: tl.constexpr, LIFTED: tl.constexpr, HAS_A: tl.constexpr,
    HAS_B: tl.constexpr, HAS_BIAS: tl.constexpr, REPULSIVE: tl.constexpr, CAP: tl.constexpr,
    CURVED: tl.constexpr, CUTOFF: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
    RANGES: tl.constexpr, MASK: tl.constexpr, EXCLUDE_SELF: tl.constexpr, DROPOUT: tl.constexpr,
    SHARED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    PRECISION: tl.constexpr, NATIVE: tl.constexpr, EXACT: tl.constexpr,
):
    """dL/d(inverse distance) of a tile, summed over heads in a fixed order, and over the batch
    where that has one table."""
    first_row, first_key = tl.program_id(0) * BLOCK_M, tl.program_id(1) * BLOCK_N
    rows = first_row + tl.arange(0, BLOCK_M)
    columns = first_key + tl.arange(0, BLOCK_N)
    row_valid = rows < queries
    inside = row_valid[:, None] & (columns < keys)[None, :]
    own = tl.program_id(2).to(tl.int64)
    at = table + own * table_batch + rows[:, None].to(tl.int64) * table_stride + columns[None, :]
    inverse = tl.load(at, mask=inside, other=1.0)
    result = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    zeros = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    last_row = tl.minimum(first_row + BLOCK_M, queries) - 1
    # One table for all of the batch, or one for each of its entries.
    count = batches * heads // tl.num_programs(2)
    if CAUSAL:
        if first_key > last_row + shift:
            count = 0
    for step in tl.range(0, count, num_stages=1):
        # A tensor also in the interpreter, where a loop counts in numbers.
        batch_head = tl.program_id(2) * count + step
        batch, head = batch_head // heads, batch_head % heads
        kv_head = head // (heads // kv_heads)
        start, stop = load_ranges(ranges, batch, rows, row_valid, ranges_b, ranges_row, RANGES)
        per_row = batch_head.to(tl.int64) * padded + rows
        lse = tl.load(saved + per_row, mask=row_valid, other=float("inf"))
        rest = 0.0
        if EXACT:
            rest = tl.load(saved + saved_plane + per_row, mask=row_valid, other=0.0)[:, None]
        delta = tl.load(delta_at + per_row, mask=row_valid, other=0.0)
        a = 1.0
        b = 1.0
        bias = 0.0
        if HAS_A:
            a_at = query_mass + batch_head.to(tl.int64) * queries + rows
            a = tl.load(a_at, mask=row_valid, other=1.0)[:, None]
        if HAS_B:
            b_at = key_term + batch_head.to(tl.int64) * keys + columns
            b = tl.load(b_at, mask=columns < keys, other=1.0)[None, :]
        if HAS_BIAS:
            bias = tl.load(head_bias + head)
        head_strength = tl.load(strength + head)
        grad_out = grad_desc.load([batch, head, first_row, 0]).reshape(BLOCK_M, BLOCK_V)
        v = v_desc.load([batch, kv_head, first_key, 0]).reshape(BLOCK_N, BLOCK_V)
        grad_weight = product(grad_out, v.T, zeros, PRECISION, NATIVE)
        softened, score, weight, bend = weights_again(
            inverse, zeros, lse[:, None], rest, rows[:, None], columns[None, :], columns[None, :],
            start[:, None], stop[:, None], batch, head, 1.0, 0.0, 0.0, head_strength, a, b, bias,
            1.0, width, ceiling, kappa, horizon, shift, window, queries, keys, mask, mask_b, mask_h,
            mask_row, mask_column, mask_lowest, LAW, PLAIN, LIFTED, HAS_A, HAS_B, HAS_BIAS,
            REPULSIVE, CAP, CURVED, CUTOFF, CAUSAL, WINDOW, RANGES, MASK, EXCLUDE_SELF, True,
            NATIVE, EXACT,
        )
        if DROPOUT:
            row_key = tl.load(saved + 3 * saved_plane + per_row, mask=row_valid, other=0.0)
            row_key = row_key.to(tl.uint32, bitcast=True)
            column_key, upper = column_keys(first_key, BLOCK_N)
            draw = drawn(row_key[:, None], column_key[None, :], upper[None, :])
            grad_weight = kept(grad_weight, draw, dropout, NATIVE) * (1.0 / (1.0 - dropout))
        grad_weight -= delta[:, None]
        distance, g, d_n, d_strength, d_a, d_b, d_bias, d_radius = pair_gradients(
            weight * grad_weight, weight, grad_weight, score, softened, bend, 0.0, 0.0,
            head_strength, a, b, bias, 1.0, width, ceiling, kappa, horizon, LAW, PLAIN, LIFTED,
            HAS_A, HAS_B, HAS_BIAS, REPULSIVE, CAP, CURVED, CUTOFF, NATIVE,
        )
        result += distance
    at = grad_table + own * queries * keys + rows[:, None].to(tl.int64) * keys + columns[None, :]
    tl.store(at, result, mask=inside)


# fmt: on


def table_gradients(problem: Problem, inputs: Inputs) -> Tensor:
    block_v = block_of(problem.width_v)
    sizes = table_tiles(inputs.v.dtype, block_v, inputs.v.device)
    rows, columns = sizes["BLOCK_M"], sizes["BLOCK_N"]
    result = torch.empty_like(problem.table)
    # In the third direction the tables: the kernel goes over what shares one itself.
    blocks = triton.cdiv(problem.queries, rows), triton.cdiv(problem.keys, columns)
    grid = (*blocks, problem.table.shape[0])
    table_kernel[grid](
        tiles(inputs.v, columns, block_v),
        tiles(inputs.grad, rows, block_v),
        inputs.saved,
        inputs.saved.stride(0),
        inputs.delta,
        result,
        padded=inputs.saved.shape[3],
        BLOCK_V=block_v,
        EXACT=exact(problem),
        **problem.tensors(),
        **problem.form.numbers,
        **sizes,
    )
    return result
