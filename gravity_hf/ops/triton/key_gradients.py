"""dL/dk, dL/dv and dL/d(key term).

A program has BLOCK_N keys of one key head and goes over the queries that see them, of every query
head that reads this key head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gradients import (
    Inputs,
    exact,
    narrow,
    pair_gradients,
    plain_factor,
    weights_again,
)
from .launch import Launch, remembered
from .problem import Problem, range_strides, tiles, vectors
from .ranges import query_ranges
from .reach import reach_arguments
from .score import (
    EXCLUDED,
    LN2,
    column_keys,
    drawn,
    inner_product,
    kept,
    product,
    scaled_sum,
    unit_of,
    vector_product,
)
from .vectors import load_vectors, vectors_row
from .visible import (
    load_ranges,
    query_span,
)


# fmt: off
@triton.jit
def attend_queries(
    grad_k, grad_v, distance_sum, mass_sum, low, high, order, k, v, k_sq, q_desc, grad_desc,
    saved_desc, delta_desc, pairs, batch, head, batch_head, columns, column_key, upper, slope,
    floor, unit, key_radius, strength, eps, factor, query_mass, b, bias, radius_sq, width, ceiling,
    kappa, horizon, table, table_batch, table_stride, start, stop, shift, window, queries, keys,
    mask, mask_b, mask_h, mask_row, mask_column, mask_lowest, dropout, scale, LAW: tl.constexpr,
    PLAIN: tl.constexpr, LIFTED: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr,
    HAS_BIAS: tl.constexpr, REPULSIVE: tl.constexpr, CAP: tl.constexpr, CURVED: tl.constexpr,
    CUTOFF: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, RANGES: tl.constexpr,
    MASK: tl.constexpr, EXCLUDE_SELF: tl.constexpr, DROPOUT: tl.constexpr, SHARED: tl.constexpr,
    SKIPS: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr,
    NATIVE: tl.constexpr, EXACT: tl.constexpr,
):
    """Tiles are `[keys, queries]` here, so that weights are a left operand as they come."""
    STEP: tl.constexpr = 1 if SKIPS else BLOCK_M
    for place in tl.range(low, high, STEP):
        first = place
        if SKIPS:
            first = tl.load(order + place) * BLOCK_M
        first = tl.multiple_of(first, BLOCK_M)
        rows = first + tl.arange(0, BLOCK_M)
        zeros = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        lse = saved_desc.load([batch_head, first]).reshape(BLOCK_M)
        if MASKED:
            lse = tl.where(rows < queries, lse, float("inf"))
        rest = 0.0
        if EXACT:
            rest = saved_desc.load([pairs + batch_head, first]).reshape(BLOCK_M)[None, :]
        delta = delta_desc.load([batch_head, first]).reshape(BLOCK_M)
        if LAW == "table":
            inside = (rows[None, :] < queries) & (columns[:, None] < keys)
            at = table + batch.to(tl.int64) * table_batch
            at = at + rows[None, :].to(tl.int64) * table_stride + columns[:, None]
            inner = tl.load(at, mask=inside, other=1.0)
            term = zeros
            q = zeros
        else:
            # In the order of the forward, for the same bits: where q is near k, another rounding of
            # the distance is another weight.
            query_term = saved_desc.load([2 * pairs + batch_head, first]).reshape(BLOCK_M)
            if not CURVED:
                query_term += eps
            if LIFTED:
                query_term += key_radius
            term = (query_term * (1.0 / unit))[None, :]
            if not LIFTED:
                term = scaled_sum(k_sq[:, None], 1.0 / unit, term, BLOCK_N, BLOCK_M)
            q = load_vectors(q_desc, batch, head, first, SHARED, BLOCK_M, BLOCK_D)
            inner = inner_product(k, q, zeros, PRECISION, NATIVE, True)
        grad_out = grad_desc.load([batch, head, first, 0]).reshape(BLOCK_M, BLOCK_V)
        grad_weight = product(v, grad_out.T, zeros, PRECISION, NATIVE)
        a = 1.0
        if HAS_A:
            at = query_mass + batch_head.to(tl.int64) * queries + rows
            a = tl.load(at, mask=rows < queries, other=1.0)[None, :]
        softened, score, weight, bend = weights_again(
            inner, term, lse[None, :], rest, rows[None, :], columns[:, None], rows[None, :],
            start[:, None], stop[:, None], batch, head, slope, floor, eps, strength, a, b, bias,
            radius_sq, width, ceiling, kappa, horizon, shift, window, queries, keys, mask, mask_b,
            mask_h, mask_row, mask_column, mask_lowest, LAW, PLAIN, LIFTED, HAS_A, HAS_B, HAS_BIAS,
            REPULSIVE, CAP, CURVED, CUTOFF, CAUSAL, WINDOW, RANGES, MASK, EXCLUDE_SELF, MASKED,
            NATIVE, EXACT,
        )
        shown = weight
        if DROPOUT:
            row_key = saved_desc.load([3 * pairs + batch_head, first]).reshape(BLOCK_M)
            row_key = row_key.to(tl.uint32, bitcast=True)
            draw = drawn(row_key[None, :], column_key[:, None], upper[:, None])
            shown = kept(weight, draw, dropout, NATIVE)
        grad_v = product(shown.to(grad_out.dtype), grad_out, grad_v, PRECISION, NATIVE)
        # `factor` differs between the heads that share these keys: it cannot wait for the end.
        delta = (delta * factor)[None, :]
        if DROPOUT and PLAIN:
            # So that `draw` need not outlive the product above.
            c = shown * (grad_weight * (factor * scale)) - weight * delta
        else:
            if DROPOUT:
                grad_weight = kept(grad_weight, draw, dropout, NATIVE) * scale
            grad_weight = grad_weight * factor - delta
            c = weight * grad_weight
        distance, g, d_n, d_strength, d_a, d_b, d_bias, d_radius = pair_gradients(
            c, weight, grad_weight, score, softened, bend, eps, floor, strength, a, b, bias,
            radius_sq, width, ceiling, kappa, horizon, LAW, PLAIN, LIFTED, HAS_A, HAS_B, HAS_BIAS,
            REPULSIVE, CAP, CURVED, CUTOFF, NATIVE,
        )
        if HAS_B and PLAIN:
            mass_sum += tl.sum(d_b, 1)
        elif HAS_B:
            mass_sum += tl.sum(d_b * grad_weight, 1)
        if LAW != "table":
            rounded, undo = narrow(distance, grad_out.dtype, SCALED)
            if not LIFTED:
                # Sixteen times the sum over queries, by tensor cores: see `query_gradients`.
                ones = tl.full([BLOCK_M, 16], 1.0, grad_out.dtype)
                if SCALED:
                    empty = tl.zeros_like(distance_sum)
                    distance_sum += product(rounded, ones, empty, PRECISION, NATIVE) * undo
                else:
                    distance_sum = product(rounded, ones, distance_sum, PRECISION, NATIVE)
            if SCALED:
                part_sum = vector_product(rounded, q, tl.zeros_like(grad_k), PRECISION, NATIVE)
                grad_k += part_sum * undo
            else:
                grad_k = vector_product(rounded, q, grad_k, PRECISION, NATIVE)
    return grad_k, grad_v, distance_sum, mass_sum


@triton.jit
def add_lone_queries(
    grad_v, saved, saved_plane, padded, grad, grad_b, grad_h, grad_row, batch, head, batch_head,
    columns, column_key, upper, shift, queries, value_width, dropout, DROPOUT: tl.constexpr,
    BLOCK_V: tl.constexpr, NATIVE: tl.constexpr,
):
    """What keys get from the queries at their own positions that are excluded from them but see no
    other: the whole gradient of the output. Mostly there are none."""
    own = columns - shift
    inside = (own >= 0) & (own < queries)
    per_row = batch_head.to(tl.int64) * padded + own
    alone = tl.load(saved + per_row, mask=inside, other=0.0) < 0.5 * EXCLUDED
    if tl.max(alone.to(tl.int32), 0) > 0:
        if DROPOUT:
            bits = tl.load(saved + 3 * saved_plane + per_row, mask=inside, other=0.0)
            bits = bits.to(tl.uint32, bitcast=True)
            draw = drawn(bits, column_key, upper)
            alone = alone & (kept(tl.full(own.shape, 1.0, tl.float32), draw, dropout, NATIVE) > 0)
        wide = tl.arange(0, BLOCK_V)[None, :]
        at = grad + batch.to(tl.int64) * grad_b + head.to(tl.int64) * grad_h
        at = at + own[:, None].to(tl.int64) * grad_row + wide
        rows = tl.load(at, mask=alone[:, None] & (wide < value_width), other=0.0)
        grad_v += rows.to(tl.float32)
    return grad_v


@triton.jit
def key_kernel(
    q_desc, k_desc, v_desc, grad_desc, saved_desc, delta_desc, saved, saved_plane, padded, grad,
    grad_b, grad_h, grad_row, key_sq, grad_key, grad_value, grad_mass, strength, eps, key_radius_sq,
    query_mass, key_term, head_bias, radius, table, table_batch, table_stride, width, ceiling,
    kappa, horizon, ranges, ranges_b, ranges_row, mask, mask_b, mask_h, mask_row, mask_column,
    mask_lowest, dropout, key_sq_stride, key_split, key_b, key_h, key_row, value_split, value_b,
    value_h, value_row, batches, heads, kv_heads, queries, keys, shift, window, head_width,
    value_width, order, counts, listed, LAW: tl.constexpr, PLAIN: tl.constexpr,
    LIFTED: tl.constexpr, HAS_A: tl.constexpr, HAS_B: tl.constexpr, HAS_BIAS: tl.constexpr,
    REPULSIVE: tl.constexpr, CAP: tl.constexpr, CURVED: tl.constexpr, CUTOFF: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOW: tl.constexpr, RANGES: tl.constexpr, MASK: tl.constexpr,
    EXCLUDE_SELF: tl.constexpr, DROPOUT: tl.constexpr, SHARED: tl.constexpr, SKIPS: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, NATIVE: tl.constexpr,
    EXACT: tl.constexpr,
):
    # The first keys have the most queries under a causal mask, and go first.
    pairs = batches * kv_heads * SPLITS
    block = tl.program_id(0) // pairs
    split = tl.program_id(0) % SPLITS
    batch_kv = tl.program_id(0) % pairs // SPLITS
    batch, kv_head = batch_kv // kv_heads, batch_kv % kv_heads
    first_key = block * BLOCK_N
    columns = first_key + tl.arange(0, BLOCK_N)
    column_valid = columns < keys

    v = v_desc.load([batch, kv_head, first_key, 0]).reshape(BLOCK_N, BLOCK_V)
    k_sq = tl.zeros([BLOCK_N], tl.float32)
    key_radius = 0.0
    if LAW == "table":
        k = 0.0
    else:
        k = load_vectors(k_desc, batch, kv_head, first_key, SHARED, BLOCK_N, BLOCK_D)
        if LIFTED:
            key_radius = tl.load(key_radius_sq + kv_head)
        else:
            norm_row = vectors_row(batch, kv_head, kv_heads, SHARED)
            at = key_sq + norm_row.to(tl.int64) * key_sq_stride + columns
            k_sq = tl.load(at, mask=column_valid, other=0.0)
    scale = 1.0
    column_key, upper = column_keys(first_key, BLOCK_N)
    if DROPOUT:
        scale = 1.0 / (1.0 - dropout)
    start, stop = load_ranges(ranges, batch, columns, column_valid, ranges_b, ranges_row, RANGES)
    last_key = tl.minimum(first_key + BLOCK_N, keys) - 1
    low, full_low, full_high, high = query_span(
        first_key, last_key, start, stop, shift, window, queries, CAUSAL, WINDOW, RANGES, MASK,
        EXCLUDE_SELF, BLOCK_M,
    )
    grad_k = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    grad_v = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    distance_sum = tl.zeros([BLOCK_N, 16], tl.float32)
    group = heads // kv_heads // SPLITS
    for member in tl.range(0, group, num_stages=1):
        head = (kv_head * SPLITS + split) * group + member
        batch_head = batch * heads + head
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
            # `mass_sum` is divided by it; a head without mass must not lose that.
            factor = plain_factor(tl.maximum(head_strength, 1e-12), unit, LAW == "power")
        if not CURVED:
            floor = head_eps / unit
        if CUTOFF != "none":
            radius_sq = tl.load(radius + head)
            radius_sq = radius_sq * radius_sq
        if HAS_BIAS:
            bias = tl.load(head_bias + head)
        b = 1.0
        if HAS_B:
            at = key_term + batch_head.to(tl.int64) * keys + columns
            b = tl.load(at, mask=column_valid, other=1.0)[:, None]
        mass_sum = tl.zeros([BLOCK_N], tl.float32)
        # Its list, if there is one.
        tile = batch_head * tl.cdiv(keys, BLOCK_N) + block
        for part in tl.static_range(3):
            if part == 2 or (not SKIPS and (part == 1 or CAUSAL or WINDOW or RANGES)):
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
                    part_high = tl.load(counts + tile)
                grad_k, grad_v, distance_sum, mass_sum = attend_queries(
                    grad_k, grad_v, distance_sum, mass_sum, part_low, part_high,
                    order + tile.to(tl.int64) * listed, k, v, k_sq, q_desc, grad_desc, saved_desc,
                    delta_desc, batches * heads, batch, head, batch_head, columns, column_key,
                    upper, -2.0 / unit, floor, unit, key_radius, head_strength, head_eps, factor,
                    query_mass, b, bias, radius_sq, width, ceiling, kappa, horizon, table,
                    table_batch, table_stride, start, stop, shift, window, queries, keys, mask,
                    mask_b, mask_h, mask_row, mask_column, mask_lowest, dropout, scale, LAW, PLAIN,
                    LIFTED, HAS_A, HAS_B, HAS_BIAS, REPULSIVE, CAP, CURVED, CUTOFF, CAUSAL, WINDOW,
                    RANGES, MASK, EXCLUDE_SELF, DROPOUT, SHARED, SKIPS, part != 1, BLOCK_M, BLOCK_N,
                    BLOCK_D, BLOCK_V, SCALED, PRECISION, NATIVE, EXACT,
                )
        if EXCLUDE_SELF:
            grad_v = add_lone_queries(
                grad_v, saved, saved_plane, padded, grad, grad_b, grad_h, grad_row, batch, head,
                batch_head, columns, column_key, upper, shift, queries, value_width, dropout,
                DROPOUT, BLOCK_V, NATIVE,
            )
        if HAS_B:
            at = grad_mass + batch_head.to(tl.int64) * keys + columns
            if PLAIN:
                mass_sum /= factor
            if HAS_B == 2:
                mass_sum *= LN2
            tl.store(at, mass_sum, mask=column_valid)
    columns_v = tl.arange(0, BLOCK_V)[None, :]
    at = grad_value + split.to(tl.int64) * value_split + batch.to(tl.int64) * value_b
    at = at + kv_head.to(tl.int64) * value_h + columns[:, None].to(tl.int64) * value_row + columns_v
    inside = column_valid[:, None] & (columns_v < value_width)
    if DROPOUT:
        grad_v *= scale
    tl.store(at, grad_v.to(grad_value.dtype.element_ty), mask=inside)
    if LAW != "table":
        grad_k = -2.0 * grad_k
        if not LIFTED:
            wide = load_vectors(k_desc, batch, kv_head, first_key, SHARED, BLOCK_N, BLOCK_D)
            near_sum = tl.sum(distance_sum, 1) * (1.0 / 16)
            grad_k += 2.0 * near_sum[:, None] * wide.to(tl.float32)
        columns_d = tl.arange(0, BLOCK_D)[None, :]
        at = grad_key + split.to(tl.int64) * key_split + batch.to(tl.int64) * key_b
        at = at + kv_head.to(tl.int64) * key_h + columns[:, None].to(tl.int64) * key_row + columns_d
        inside = column_valid[:, None] & (columns_d < head_width)
        tl.store(at, grad_k.to(grad_key.dtype.element_ty), mask=inside)


# fmt: on


def key_gradients(
    problem: Problem, inputs: Inputs, sizes: dict | None = None
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """dL/dk, dL/dv, and dL/d(key term) `[B, H, Tk]`."""
    form, v = problem.form, inputs.v
    sizes = sizes or form.tiles["key"]
    rows, columns = sizes["BLOCK_M"], sizes["BLOCK_N"]
    blocks = triton.cdiv(problem.keys, columns) * problem.batch * problem.kv_heads
    splits = head_splits(problem, blocks, v.device)
    grad_v = _room(problem.v, splits)
    grad_k = grad_v
    grad_mass = inputs.saved
    if problem.key_term is not None:
        grad_mass = torch.empty_like(problem.key_term)
    v_tiles = tiles(v, columns, form.widths.width_v)
    q_tiles = k_tiles = v_tiles
    key_sq = inputs.saved
    if inputs.q is not None:
        grad_k = _room(problem.k, splits)
        q_tiles = tiles(inputs.q, rows, form.widths.width_k)
        k_tiles = tiles(inputs.k, columns, form.widths.width_k)
        if inputs.norms is not None:
            key_sq = inputs.norms
    tensors = problem.tensors()
    if problem.key_ranges is not None:
        tensors["ranges"] = query_ranges(problem.key_ranges, problem.queries, problem.keys)
    order, counts, reach = reach_arguments(problem, rows, columns, by_key=True)
    tensors |= {
        "saved": inputs.saved,
        "grad": inputs.grad,
        "key_sq": key_sq,
        "grad_key": grad_k,
        "grad_value": grad_v,
        "grad_mass": grad_mass,
        "order": order,
        "counts": counts,
    }
    key = ("key", splits, inputs.grad.stride(), *sizes.values(), *reach.values())
    more = {"SPLITS": splits, **sizes, **reach}
    remembered(form.launches, key, lambda: _launch(problem, tensors, blocks * splits, more))(
        q_desc=q_tiles,
        k_desc=k_tiles,
        v_desc=v_tiles,
        grad_desc=tiles(inputs.grad, rows, form.widths.width_v),
        saved_desc=vectors(inputs.saved, rows),
        delta_desc=vectors(inputs.delta, rows),
        **tensors,
    )
    return (
        None if inputs.q is None else _joined(grad_k, problem.k),
        _joined(grad_v, problem.v),
        None if problem.key_term is None else grad_mass,
    )


def _launch(problem: Problem, tensors: dict[str, Tensor], programs: int, more: dict) -> Launch:
    form = problem.form
    saved, grad = tensors["saved"], tensors["grad"]
    grad_k, grad_v = tensors["grad_key"], tensors["grad_value"]
    numbers = dict(form.numbers)
    if problem.key_ranges is not None:
        numbers["ranges_b"], _ = range_strides(tensors["ranges"])
        numbers["ranges_row"] = tensors["ranges"].stride(1)
    return Launch(
        key_kernel,
        (programs,),
        saved_plane=saved.stride(0),
        padded=saved.shape[3],
        grad_b=grad.stride(0),
        grad_h=grad.stride(1),
        grad_row=grad.stride(2),
        key_sq_stride=tensors["key_sq"].stride(0),
        key_split=grad_k.stride(0),
        key_b=grad_k.stride(1),
        key_h=grad_k.stride(2),
        key_row=grad_k.stride(3),
        value_split=grad_v.stride(0),
        value_b=grad_v.stride(1),
        value_h=grad_v.stride(2),
        value_row=grad_v.stride(3),
        head_width=problem.width_k,
        value_width=problem.width_v,
        SCALED=problem.v.dtype == torch.float16,
        BLOCK_D=form.widths.width_k,
        BLOCK_V=form.widths.width_v,
        EXACT=exact(problem),
        **numbers,
        **more,
    )


def _room(like: Tensor, splits: int) -> Tensor:
    """For a gradient of each of the programs that share a key head."""
    if splits == 1:
        return torch.empty_like(like).unsqueeze(0)
    return torch.empty((splits, *like.shape), dtype=torch.float32, device=like.device)


def _joined(parts: Tensor, like: Tensor) -> Tensor:
    # Laid out as the tensor is, which is what a compiler is told.
    return parts[0] if parts.shape[0] == 1 else torch.empty_like(like).copy_(parts.sum(0))


def head_splits(problem: Problem, blocks: int, device: torch.device) -> int:
    """Into how many programs the query heads of a key head are divided: enough to fill the device,
    each writing its own float32 sums, added up afterwards in a fixed order."""
    group = problem.heads // problem.kv_heads
    if group == 1:
        return 1
    processors = 1
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
    splits = 1
    while splits < group and group % (2 * splits) == 0 and blocks * splits < processors:
        splits *= 2
    return splits
