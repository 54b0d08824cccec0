"""Four kernels of the gradient: each block with the queries that chose it, each query with its
window, its sinks and its parts, the sinks with all queries, and each key with the queries in whose
window it lies.

Weights are computed again from the logarithms of the rows' sums. Every sum has one owner and one
order: nothing is added up by atomic operations, so that a gradient is the same to the last bit
every time.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .kernels import law_scores, load_keys, load_rows, multiply, near_from, squares

# A power of two, for all of `Terms`.
COUNT = 8


class Terms(NamedTuple):
    """Sums over the keys of a row, `[B, H, Tq]`, in the order in which kernels keep them. With `c`
    the gradient of a score, `w` its weight, `s` the derivative of the score for a squared distance,
    `b` that for a strength, and `near` for pairs whose distance was not clamped: `c s`, `c b`, `c s
    near`, `w s`, `w b`, `w s near`, `w dL/dw`.

    `c` has the gradient's product with the output in it, `shift`, and the output is rounded. The
    last sum is the product exactly, so that the rounding is taken out again afterwards: alone
    `shift` would be as wrong for all keys of a row, which strengths and softenings sum up.
    """

    softening: Tensor
    strength: Tensor
    distance: Tensor
    slope: Tensor
    base: Tensor
    near: Tensor
    exact: Tensor

    def mended(self, shift: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of strength, softening and squared distance by row."""
        rounding = shift - self.exact
        return (
            self.strength + rounding * self.base,
            self.softening + rounding * self.slope,
            self.distance + rounding * self.near,
        )


# fmt: off
@triton.jit
def add_terms(
    terms, of_score, weight, of_weight, base, slope, near, LAW: tl.constexpr, COUNT: tl.constexpr,
):
    """Sums over keys that a row's own constants need, `[rows, COUNT]`, in the order of `Terms`."""
    column = tl.arange(0, COUNT)[None, :]
    if LAW != "dot":
        toward = of_score * slope
        terms += tl.where(column == 0, tl.sum(toward, 1)[:, None], 0.0)
        terms += tl.where(column == 1, tl.sum(of_score * base, 1)[:, None], 0.0)
        terms += tl.where(column == 2, tl.sum(tl.where(near, toward, 0.0), 1)[:, None], 0.0)
        terms += tl.where(column == 3, tl.sum(weight * slope, 1)[:, None], 0.0)
        terms += tl.where(column == 4, tl.sum(weight * base, 1)[:, None], 0.0)
        near_slope = tl.where(near, weight * slope, 0.0)
        terms += tl.where(column == 5, tl.sum(near_slope, 1)[:, None], 0.0)
        terms += tl.where(column == 6, tl.sum(weight * of_weight, 1)[:, None], 0.0)
    return terms


@triton.jit
def pair_gradients(
    terms, query, query_sq, strengths, softenings, grad, log_sum, shift, key_rows, key_sq, values,
    meant, LAW: tl.constexpr, LIFTED: tl.constexpr, NATIVE: tl.constexpr, COUNT: tl.constexpr,
):
    """Weights `[rows, keys]`; the gradient of products (of a dot product) or of squared distances;
    and `terms` with what these pairs add to them."""
    product = multiply(query, tl.trans(key_rows), NATIVE)
    score = law_scores(product, query_sq, key_sq, strengths, softenings, LAW, LIFTED)
    weight = tl.where(meant, tl.exp(score - log_sum[:, None]), 0.0)
    of_weight = multiply(grad, tl.trans(values), NATIVE)
    of_score = weight * (of_weight - shift[:, None])
    if LAW == "dot":
        return weight, of_score * strengths[:, None], terms
    else:
        if LIFTED:
            distance = query_sq[:, None] - 2.0 * product
        else:
            distance = query_sq[:, None] + key_sq[None, :] - 2.0 * product
        softened = tl.maximum(distance, 0.0) + softenings[:, None]
        inverse = 1.0 / softened
        if LAW == "power":
            base = -tl.log(softened)
            slope = -strengths[:, None] * inverse
        else:
            base = inverse
            slope = -strengths[:, None] * inverse * inverse
        # Where a distance is clamped its softening still counts.
        near = distance >= 0.0
        terms = add_terms(terms, of_score, weight, of_weight, base, slope, near, LAW, COUNT)
        return weight, tl.where(near, of_score * slope, 0.0), terms


@triton.jit
def to_vectors(toward, others, LAW: tl.constexpr, NATIVE: tl.constexpr):
    """`toward [n, m]` times `others [m, width]`; of squared distances as exactly as in float32, by
    parts that tensor cores take: near vectors are what is left of large sums."""
    if LAW == "dot":
        return multiply(toward.to(others.dtype), others, NATIVE)
    else:
        return -2.0 * tl.dot(toward, others.to(tl.float32), input_precision="tf32x3")


@triton.jit
def load_given(
    grad, log_sums, shifts, batch, head, key_heads, rows, alive, queries, GROUPS: tl.constexpr,
    WIDTH_V: tl.constexpr, WIDTH_V_PAD: tl.constexpr,
):
    """Of rows: the gradient of the output `[rows, WIDTH_V_PAD]`, the logarithm of the sum, and the
    product of gradient and output."""
    column = tl.arange(0, WIDTH_V_PAD)
    at = ((batch * key_heads + head) * GROUPS + rows % GROUPS).to(tl.int64) * queries
    at += rows // GROUPS
    fits = alive[:, None] & (column < WIDTH_V)[None, :]
    given = tl.load(grad + at[:, None] * WIDTH_V + column[None, :], mask=fits, other=0.0)
    log_sum = tl.load(log_sums + at, mask=alive, other=float("inf"))
    return given, log_sum, tl.load(shifts + at, mask=alive, other=0.0), at


@triton.jit
def block_gradient_kernel(
    q, k, v, strength, softening, radius, grad, log_sums, shifts, rows_of, edges, first, last,
    allowed, origin, part_q, part_terms, grad_k, grad_v, stride_qb, stride_qh, stride_qt,
    stride_kb, stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, queries, keys, blocks,
    key_heads, first_rows, GROUPS: tl.constexpr, SIZE: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, DENSE: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_V: tl.constexpr, WIDTH_PAD: tl.constexpr, WIDTH_V_PAD: tl.constexpr, LAW: tl.constexpr,
    LIFTED: tl.constexpr,
    NATIVE: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr, COUNT: tl.constexpr,
):
    """Program: a block of a batch row and key head. grad_k `[B, G, Tk, D]`, grad_v; part_q
    `[places, D]` and part_terms `[places, COUNT]`: float32."""
    code = tl.program_id(0)
    head_of_batch = code // blocks
    block = code % blocks
    batch = head_of_batch // key_heads
    head = head_of_batch % key_heads
    inside = tl.arange(0, BLOCK_N)
    key = block * SIZE + inside
    if origin is not None:
        key += tl.load(origin + batch)
    real = (inside < SIZE) & (key < keys)
    fits = real
    if allowed is not None:
        seen = tl.load(allowed + batch.to(tl.int64) * keys + key, mask=fits, other=0)
        fits = fits & (seen != 0)
    base = k + batch.to(tl.int64) * stride_kb + head.to(tl.int64) * stride_kh
    key_rows = load_keys(base, key, fits, stride_kt, WIDTH, WIDTH_PAD)
    base = v + batch.to(tl.int64) * stride_vb + head.to(tl.int64) * stride_vh
    values = load_keys(base, key, fits, stride_vt, WIDTH_V, WIDTH_V_PAD)
    key_sq = squares(key_rows, LAW)
    of_keys = tl.zeros([BLOCK_N, WIDTH_PAD], tl.float32)
    of_values = tl.zeros([BLOCK_N, WIDTH_V_PAD], tl.float32)
    sums = tl.zeros([BLOCK_N], tl.float32)
    column = tl.arange(0, WIDTH_PAD)
    for tile in range(tl.load(edges + code), tl.load(edges + code + 1)):
        place = tl.full([TILE], TILE, tl.int64) * tile + tl.arange(0, TILE)
        rows = tl.load(rows_of + place)
        alive = rows >= 0
        rows = tl.maximum(rows, 0)
        query, query_sq, strengths, softenings = load_rows(
            q + batch.to(tl.int64) * stride_qb, rows, alive, head, strength, softening, radius,
            stride_qh, stride_qt, GROUPS, WIDTH, WIDTH_PAD, LAW, LIFTED,
        )
        given, log_sum, shift, _ = load_given(
            grad, log_sums, shifts, batch, head, key_heads, rows, alive, queries, GROUPS, WIDTH_V,
            WIDTH_V_PAD,
        )
        time = rows // GROUPS
        own = tl.load(last + batch.to(tl.int64) * queries + time)
        begin = tl.load(first + batch.to(tl.int64) * first_rows + tl.minimum(time, first_rows - 1))
        meant = (key[None, :] >= begin[:, None] + SINKS) & (key[None, :] <= own[:, None] - WINDOW)
        meant = meant & fits[None, :] & alive[:, None]
        weight, toward, terms = pair_gradients(
            tl.zeros([TILE, COUNT], tl.float32), query, query_sq, strengths, softenings, given,
            log_sum, shift, key_rows, key_sq, values, meant, LAW, LIFTED, NATIVE, COUNT,
        )
        of_values += multiply(tl.trans(weight).to(given.dtype), given, NATIVE)
        of_keys += to_vectors(tl.trans(toward), query, LAW, NATIVE)
        part = to_vectors(toward, key_rows, LAW, NATIVE)
        if LAW != "dot":
            sums += tl.sum(toward, 0)
            part += 2.0 * tl.sum(toward, 1)[:, None] * query.to(tl.float32)
        at = place[:, None] * WIDTH + column[None, :]
        tl.store(part_q + at, part, mask=(column < WIDTH)[None, :])
        at = place[:, None] * COUNT + tl.arange(0, COUNT)[None, :]
        tl.store(part_terms + at, terms)
    if LAW != "dot" and not LIFTED:
        of_keys += 2.0 * sums[:, None] * key_rows.to(tl.float32)
    at = (head_of_batch.to(tl.int64) * keys + key)[:, None]
    wide = real[:, None] & (column < WIDTH)[None, :]
    tl.store(grad_k + at * WIDTH + column[None, :], of_keys, mask=wide)
    column_v = tl.arange(0, WIDTH_V_PAD)
    wide = real[:, None] & (column_v < WIDTH_V)[None, :]
    tl.store(grad_v + at * WIDTH_V + column_v[None, :], of_values, mask=wide)


@triton.jit
def add_near(
    of_query, terms, query, query_sq, strengths, softenings, given, log_sum, shift, k, v, key,
    fits, meant, stride_kt, stride_vt, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    WIDTH_PAD: tl.constexpr, WIDTH_V_PAD: tl.constexpr, LAW: tl.constexpr, LIFTED: tl.constexpr,
    NATIVE: tl.constexpr, COUNT: tl.constexpr,
):
    key_rows = load_keys(k, key, fits, stride_kt, WIDTH, WIDTH_PAD)
    values = load_keys(v, key, fits, stride_vt, WIDTH_V, WIDTH_V_PAD)
    _, toward, terms = pair_gradients(
        terms, query, query_sq, strengths, softenings, given, log_sum, shift, key_rows,
        squares(key_rows, LAW), values, meant & fits[None, :], LAW, LIFTED, NATIVE, COUNT,
    )
    of_query += to_vectors(toward, key_rows, LAW, NATIVE)
    if LAW != "dot":
        of_query += 2.0 * tl.sum(toward, 1)[:, None] * query.to(tl.float32)
    return of_query, terms


@triton.jit
def query_gradient_kernel(
    q, k, v, strength, softening, radius, grad, log_sums, shifts, places, first, last, allowed,
    part_q, part_terms, grad_q, terms, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh,
    stride_kt, stride_vb, stride_vh, stride_vt, queries, keys, key_heads, first_rows, choices,
    GROUPS: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, DENSE: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, WIDTH_PAD: tl.constexpr, WIDTH_V_PAD: tl.constexpr,
    LAW: tl.constexpr, LIFTED: tl.constexpr, NATIVE: tl.constexpr,
    TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, COUNT: tl.constexpr,
):
    """Program: `TILE` rows of a batch row and key head. grad_q `[B, H, Tq, D]` and terms `[B, H,
    Tq, COUNT]`: float32."""
    head_of_batch = tl.program_id(1)
    batch = (head_of_batch // key_heads).to(tl.int64)
    head = head_of_batch % key_heads
    rows = tl.program_id(0) * TILE + tl.arange(0, TILE)
    alive = rows < queries * GROUPS
    rows = tl.minimum(rows, queries * GROUPS - 1)
    query, query_sq, strengths, softenings = load_rows(
        q + batch * stride_qb, rows, alive, head, strength, softening, radius,
        stride_qh, stride_qt, GROUPS, WIDTH, WIDTH_PAD, LAW, LIFTED,
    )
    given, log_sum, shift, row = load_given(
        grad, log_sums, shifts, batch, head, key_heads, rows, alive, queries, GROUPS, WIDTH_V,
        WIDTH_V_PAD,
    )
    time = rows // GROUPS
    own = tl.load(last + batch * queries + time)
    begin = tl.load(first + batch * first_rows + tl.minimum(time, first_rows - 1))
    begin = tl.where(own < 0, keys, begin)
    lowest = near_from(own, begin, WINDOW, DENSE)
    k += batch * stride_kb + head.to(tl.int64) * stride_kh
    v += batch * stride_vb + head.to(tl.int64) * stride_vh
    of_query = tl.zeros([TILE, WIDTH_PAD], tl.float32)
    sums = tl.zeros([TILE, COUNT], tl.float32)
    for start in range(tl.min(lowest), tl.max(own) + 1, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        fits = key < keys
        if allowed is not None:
            fits = fits & (tl.load(allowed + batch * keys + key, mask=fits, other=0) != 0)
        meant = (key[None, :] >= lowest[:, None]) & (key[None, :] <= own[:, None])
        of_query, sums = add_near(
            of_query, sums, query, query_sq, strengths, softenings, given, log_sum, shift, k, v,
            key, fits, meant, stride_kt, stride_vt, WIDTH, WIDTH_V, WIDTH_PAD, WIDTH_V_PAD, LAW,
            LIFTED, NATIVE, COUNT,
        )
    for start in range(tl.min(begin), tl.max(tl.where(own < 0, -1, begin + SINKS)), BLOCK_S):
        key = start + tl.arange(0, BLOCK_S)
        fits = key < keys
        if allowed is not None:
            fits = fits & (tl.load(allowed + batch * keys + key, mask=fits, other=0) != 0)
        meant = (key[None, :] >= begin[:, None]) & (key[None, :] < begin[:, None] + SINKS)
        meant = meant & (key[None, :] < lowest[:, None])
        of_query, sums = add_near(
            of_query, sums, query, query_sq, strengths, softenings, given, log_sum, shift, k, v,
            key, fits, meant, stride_kt, stride_vt, WIDTH, WIDTH_V, WIDTH_PAD, WIDTH_V_PAD, LAW,
            LIFTED, NATIVE, COUNT,
        )
    column = tl.arange(0, WIDTH_PAD)
    wide = (column < WIDTH)[None, :]
    base = (head_of_batch.to(tl.int64) * queries + time) * choices
    for choice in range(0, choices):
        place = tl.load(places + base + choice, mask=alive, other=-1)
        chosen = place >= 0
        part_row = tl.where(chosen, place + rows % GROUPS, 0).to(tl.int64)
        at = part_row[:, None] * WIDTH + column[None, :]
        of_query += tl.load(part_q + at, mask=chosen[:, None] & wide, other=0.0)
        at = part_row[:, None] * COUNT + tl.arange(0, COUNT)[None, :]
        sums += tl.load(part_terms + at, mask=chosen[:, None], other=0.0)
    tl.store(grad_q + row[:, None] * WIDTH + column[None, :], of_query, mask=alive[:, None] & wide)
    at = row[:, None] * COUNT + tl.arange(0, COUNT)[None, :]
    tl.store(terms + at, sums, mask=alive[:, None])


@triton.jit
def add_to_keys(
    of_keys, of_values, sums, q, strength, softening, radius, grad, log_sums, shifts, first, last,
    tile, batch, head, key, key_rows, key_sq, values, fits, stride_qh, stride_qt, queries,
    key_heads, first_rows, GROUPS: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    DENSE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, WIDTH_PAD: tl.constexpr,
    WIDTH_V_PAD: tl.constexpr, LAW: tl.constexpr, LIFTED: tl.constexpr, NATIVE: tl.constexpr,
    TILE: tl.constexpr, COUNT: tl.constexpr, NEAR: tl.constexpr, SUNK: tl.constexpr,
):
    """What a tile of rows adds to keys that lie in its windows (NEAR) or are its sinks (SUNK)."""
    rows = tile * TILE + tl.arange(0, TILE)
    alive = rows < queries * GROUPS
    rows = tl.minimum(rows, queries * GROUPS - 1)
    query, query_sq, strengths, softenings = load_rows(
        q, rows, alive, head, strength, softening, radius, stride_qh, stride_qt, GROUPS, WIDTH,
        WIDTH_PAD, LAW, LIFTED,
    )
    given, log_sum, shift, _ = load_given(
        grad, log_sums, shifts, batch, head, key_heads, rows, alive, queries, GROUPS, WIDTH_V,
        WIDTH_V_PAD,
    )
    time = rows // GROUPS
    own = tl.load(last + batch * queries + time)[:, None]
    begin = tl.load(first + batch * first_rows + tl.minimum(time, first_rows - 1))[:, None]
    lowest = near_from(own, begin, WINDOW, DENSE)
    meant = fits[None, :] & alive[:, None] & (key[None, :] >= begin)
    near = (key[None, :] >= lowest) & (key[None, :] <= own)
    sunk = (key[None, :] < begin + SINKS) & (key[None, :] < lowest)
    meant = meant & ((near & NEAR) | (sunk & SUNK))
    weight, toward, _ = pair_gradients(
        tl.zeros([TILE, COUNT], tl.float32), query, query_sq, strengths, softenings, given,
        log_sum, shift, key_rows, key_sq, values, meant, LAW, LIFTED, NATIVE, COUNT,
    )
    of_values += multiply(tl.trans(weight).to(given.dtype), given, NATIVE)
    of_keys += to_vectors(tl.trans(toward), query, LAW, NATIVE)
    if LAW != "dot":
        sums += tl.sum(toward, 0)
    return of_keys, of_values, sums


@triton.jit
def sink_gradient_kernel(
    q, k, v, strength, softening, radius, grad, log_sums, shifts, first, last, allowed, sunk_k,
    sunk_v, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb, stride_vh,
    stride_vt, queries, keys, key_heads, row_tiles, GROUPS: tl.constexpr, WINDOW: tl.constexpr,
    SINKS: tl.constexpr, DENSE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    WIDTH_PAD: tl.constexpr, WIDTH_V_PAD: tl.constexpr, LAW: tl.constexpr, LIFTED: tl.constexpr,
    NATIVE: tl.constexpr, TILE: tl.constexpr, BLOCK_S: tl.constexpr,
    COUNT: tl.constexpr, SHARE: tl.constexpr,
):
    """Program: `SHARE` tiles of rows of a batch row and key head, whose sinks are all the same.
    sunk_k float32 `[shares, B, G, BLOCK_S, D]`, sunk_v: what they add to those."""
    head_of_batch = tl.program_id(1)
    batch = (head_of_batch // key_heads).to(tl.int64)
    head = head_of_batch % key_heads
    inside = tl.arange(0, BLOCK_S)
    key = tl.load(first + batch) + inside
    fits = (inside < SINKS) & (key < keys)
    if allowed is not None:
        fits = fits & (tl.load(allowed + batch * keys + key, mask=fits, other=0) != 0)
    base = k + batch * stride_kb + head.to(tl.int64) * stride_kh
    key_rows = load_keys(base, key, fits, stride_kt, WIDTH, WIDTH_PAD)
    base = v + batch * stride_vb + head.to(tl.int64) * stride_vh
    values = load_keys(base, key, fits, stride_vt, WIDTH_V, WIDTH_V_PAD)
    key_sq = squares(key_rows, LAW)
    of_keys = tl.zeros([BLOCK_S, WIDTH_PAD], tl.float32)
    of_values = tl.zeros([BLOCK_S, WIDTH_V_PAD], tl.float32)
    sums = tl.zeros([BLOCK_S], tl.float32)
    start = tl.program_id(0) * SHARE
    for tile in range(start, tl.minimum(start + SHARE, row_tiles)):
        of_keys, of_values, sums = add_to_keys(
            of_keys, of_values, sums, q + batch * stride_qb, strength, softening, radius, grad,
            log_sums, shifts, first, last, tile, batch, head, key, key_rows, key_sq, values, fits,
            stride_qh, stride_qt, queries, key_heads, 1, GROUPS, WINDOW, SINKS, DENSE, WIDTH,
            WIDTH_V, WIDTH_PAD, WIDTH_V_PAD, LAW, LIFTED, NATIVE, TILE, COUNT, False, True,
        )
    if LAW != "dot" and not LIFTED:
        of_keys += 2.0 * sums[:, None] * key_rows.to(tl.float32)
    column = tl.arange(0, WIDTH_PAD)
    share = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + head_of_batch
    at = (share * BLOCK_S + inside)[:, None]
    tl.store(sunk_k + at * WIDTH + column[None, :], of_keys, mask=(column < WIDTH)[None, :])
    column_v = tl.arange(0, WIDTH_V_PAD)
    wide = (column_v < WIDTH_V)[None, :]
    tl.store(sunk_v + at * WIDTH_V + column_v[None, :], of_values, mask=wide)


@triton.jit
def key_gradient_kernel(
    q, k, v, strength, softening, radius, grad, log_sums, shifts, first, last, allowed, ends,
    sunk_k, sunk_v, grad_k, grad_v, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh,
    stride_kt, stride_vb, stride_vh, stride_vt, queries, keys, key_heads, first_rows, row_tiles,
    all_tiles, GROUPS: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    DENSE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, WIDTH_PAD: tl.constexpr,
    WIDTH_V_PAD: tl.constexpr, LAW: tl.constexpr, LIFTED: tl.constexpr,
    NATIVE: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
    COUNT: tl.constexpr, TILES: tl.constexpr,
):
    """Program: `BLOCK_N` keys of a batch row and key head, to whose gradients in grad_k and grad_v
    those of windows and sinks are added. ends: int32 `[4, B, row_tiles]`, of `TILE` rows the lowest
    and highest key of their windows, and of their sinks. sunk_k `[B, G, BLOCK_S, D]` and sunk_v:
    of the sinks, where those of all rows are the same; None: they are not."""
    head_of_batch = tl.program_id(1)
    batch = (head_of_batch // key_heads).to(tl.int64)
    head = head_of_batch % key_heads
    start = tl.program_id(0) * BLOCK_N
    key = start + tl.arange(0, BLOCK_N)
    real = key < keys
    fits = real
    if allowed is not None:
        fits = fits & (tl.load(allowed + batch * keys + key, mask=fits, other=0) != 0)
    base = k + batch * stride_kb + head.to(tl.int64) * stride_kh
    key_rows = load_keys(base, key, fits, stride_kt, WIDTH, WIDTH_PAD)
    base = v + batch * stride_vb + head.to(tl.int64) * stride_vh
    values = load_keys(base, key, fits, stride_vt, WIDTH_V, WIDTH_V_PAD)
    key_sq = squares(key_rows, LAW)
    of_keys = tl.zeros([BLOCK_N, WIDTH_PAD], tl.float32)
    of_values = tl.zeros([BLOCK_N, WIDTH_V_PAD], tl.float32)
    sums = tl.zeros([BLOCK_N], tl.float32)
    # The first and the last tile of rows that these keys can matter to.
    lowest, highest = row_tiles, -1
    for at in range(0, row_tiles, TILES):
        tile = at + tl.arange(0, TILES)
        span = ends + batch * row_tiles + tile
        inside = tile < row_tiles
        near = inside & (tl.load(span, mask=inside, other=0) < start + BLOCK_N)
        near = near & (tl.load(span + all_tiles, mask=inside, other=-1) >= start)
        if sunk_k is None:
            sink = inside & (tl.load(span + 2 * all_tiles, mask=inside, other=0) < start + BLOCK_N)
            sink = sink & (tl.load(span + 3 * all_tiles, mask=inside, other=-1) >= start)
            near = near | sink
        lowest = tl.minimum(lowest, tl.min(tl.where(near, tile, row_tiles), 0))
        highest = tl.maximum(highest, tl.max(tl.where(near, tile, -1), 0))
    for tile in range(lowest, highest + 1):
        of_keys, of_values, sums = add_to_keys(
            of_keys, of_values, sums, q + batch * stride_qb, strength, softening, radius, grad,
            log_sums, shifts, first, last, tile, batch, head, key, key_rows, key_sq, values, fits,
            stride_qh, stride_qt, queries, key_heads, first_rows, GROUPS, WINDOW, SINKS, DENSE,
            WIDTH, WIDTH_V, WIDTH_PAD, WIDTH_V_PAD, LAW, LIFTED, NATIVE, TILE, COUNT, True,
            sunk_k is None,
        )
    if LAW != "dot" and not LIFTED:
        of_keys += 2.0 * sums[:, None] * key_rows.to(tl.float32)
    column = tl.arange(0, WIDTH_PAD)
    column_v = tl.arange(0, WIDTH_V_PAD)
    wide = real[:, None] & (column < WIDTH)[None, :]
    wide_v = real[:, None] & (column_v < WIDTH_V)[None, :]
    if sunk_k is not None:
        place = key - tl.load(first + batch)
        sink = ((place >= 0) & (place < SINKS))[:, None]
        at = (head_of_batch * BLOCK_S + place)[:, None]
        of_keys += tl.load(sunk_k + at * WIDTH + column[None, :], mask=wide & sink, other=0.0)
        at = at * WIDTH_V + column_v[None, :]
        of_values += tl.load(sunk_v + at, mask=wide_v & sink, other=0.0)
    at = (head_of_batch.to(tl.int64) * keys + key)[:, None]
    place = grad_k + at * WIDTH + column[None, :]
    tl.store(place, of_keys + tl.load(place, mask=wide, other=0.0), mask=wide)
    place = grad_v + at * WIDTH_V + column_v[None, :]
    tl.store(place, of_values + tl.load(place, mask=wide_v, other=0.0), mask=wide_v)
# fmt: on
