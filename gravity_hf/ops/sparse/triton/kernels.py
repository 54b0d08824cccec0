"""Two kernels: blocks with the queries that chose them, then each query with its window and parts.

A part is the highest score, the sum and the output of the keys of one block alone. Scores are in
nats and in float32.
"""

from __future__ import annotations

import triton
import triton.language as tl


# fmt: off
@triton.jit
def law_scores(
    product, query_sq, key_sq, strength, softening, LAW: tl.constexpr, LIFTED: tl.constexpr,
):
    """`[rows, keys]` from products; `strength` is the scaling of a dot product or `M^2` `[rows]`.
    Of lifted keys `query_sq` holds the radius, too."""
    if LAW == "dot":
        return product * strength[:, None]
    else:
        if LIFTED:
            distance = query_sq[:, None] - 2.0 * product
        else:
            distance = query_sq[:, None] + key_sq[None, :] - 2.0 * product
        softened = tl.maximum(distance, 0.0) + softening[:, None]
        if LAW == "power":
            return -strength[:, None] * tl.log(softened)
        else:
            return strength[:, None] / softened


@triton.jit
def load_rows(
    q, rows, alive, head, strength, softening, radius, stride_qh, stride_qt, GROUPS: tl.constexpr,
    WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr, LAW: tl.constexpr, LIFTED: tl.constexpr,
):
    """Queries `[rows, WIDTH_PAD]`, their squared lengths, and the terms of their heads."""
    column = tl.arange(0, WIDTH_PAD)
    heads = head * GROUPS + rows % GROUPS
    at = heads.to(tl.int64) * stride_qh + (rows // GROUPS).to(tl.int64) * stride_qt
    fits = alive[:, None] & (column < WIDTH)[None, :]
    query = tl.load(q + at[:, None] + column[None, :], mask=fits, other=0.0)
    strengths = tl.load(strength + heads, mask=alive, other=0.0)
    query_sq = strengths
    softenings = strengths
    if LAW != "dot":
        softenings = tl.load(softening + heads, mask=alive, other=1.0)
        wide = query.to(tl.float32)
        query_sq = tl.sum(wide * wide, 1)
        if LIFTED:
            query_sq += tl.load(radius + head)
    return query, query_sq, strengths, softenings


@triton.jit
def load_keys(x, key, fits, stride_t, WIDTH: tl.constexpr, WIDTH_PAD: tl.constexpr):
    """`[keys, WIDTH_PAD]`."""
    column = tl.arange(0, WIDTH_PAD)
    at = key.to(tl.int64)[:, None] * stride_t + column[None, :]
    return tl.load(x + at, mask=fits[:, None] & (column < WIDTH)[None, :], other=0.0)


@triton.jit
def multiply(x, y, NATIVE: tl.constexpr):
    """The interpreter cannot multiply bfloat16; in float32 its products are exact."""
    if NATIVE:
        return tl.dot(x, y, input_precision="ieee")
    else:
        return tl.dot(x.to(tl.float32), y.to(tl.float32), input_precision="ieee")


@triton.jit
def squares(x, LAW: tl.constexpr):
    if LAW == "dot":
        return tl.zeros([x.shape[0]], dtype=tl.float32)
    else:
        wide = x.to(tl.float32)
        return tl.sum(wide * wide, 1)


@triton.jit
def near_from(own, begin, WINDOW: tl.constexpr, DENSE: tl.constexpr):
    """The first key of a row's window, which holds all keys where they are few."""
    return tl.where(own - begin < DENSE, begin, tl.maximum(begin, own - WINDOW + 1))


@triton.jit
def tile_kernel(
    q, k, v, strength, softening, radius, rows_of, block_of, edges, first, last, allowed, origin,
    outputs, highest, sums, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt,
    stride_vb, stride_vh, stride_vt, queries, keys, blocks, every, key_heads, first_rows,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    DENSE: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, WIDTH_PAD: tl.constexpr,
    WIDTH_V_PAD: tl.constexpr, LAW: tl.constexpr, LIFTED: tl.constexpr,
    NATIVE: tl.constexpr, TILE: tl.constexpr, BLOCK_N: tl.constexpr,
):
    """Program: a tile. first `[B, first_rows]`, last `[B, Tq]`, origin `[B]` int32; allowed bool
    `[B, Tk]`."""
    tile = tl.program_id(0)
    if tile < tl.load(edges + every):
        code = tl.load(block_of + tile)
        head_of_batch = code // blocks
        block = code % blocks
        batch = head_of_batch // key_heads
        head = head_of_batch % key_heads
        place = tile.to(tl.int64) * TILE + tl.arange(0, TILE)
        rows = tl.load(rows_of + place)
        alive = rows >= 0
        rows = tl.maximum(rows, 0)
        query, query_sq, strengths, softenings = load_rows(
            q + batch.to(tl.int64) * stride_qb, rows, alive, head, strength, softening, radius,
            stride_qh, stride_qt, GROUPS, WIDTH, WIDTH_PAD, LAW, LIFTED,
        )
        inside = tl.arange(0, BLOCK_N)
        key = block * SIZE + inside
        if origin is not None:
            key += tl.load(origin + batch)
        fits = (inside < SIZE) & (key < keys)
        if allowed is not None:
            seen = tl.load(allowed + batch.to(tl.int64) * keys + key, mask=fits, other=0)
            fits = fits & (seen != 0)
        base = k + batch.to(tl.int64) * stride_kb + head.to(tl.int64) * stride_kh
        key_rows = load_keys(base, key, fits, stride_kt, WIDTH, WIDTH_PAD)
        product = multiply(query, tl.trans(key_rows), NATIVE)
        score = law_scores(
            product, query_sq, squares(key_rows, LAW), strengths, softenings, LAW, LIFTED
        )
        time = rows // GROUPS
        own = tl.load(last + batch.to(tl.int64) * queries + time)
        begin = tl.load(first + batch.to(tl.int64) * first_rows + tl.minimum(time, first_rows - 1))
        meant = (key[None, :] >= begin[:, None] + SINKS) & (key[None, :] <= own[:, None] - WINDOW)
        score = tl.where(meant & fits[None, :] & alive[:, None], score, -float("inf"))
        top = tl.max(score, 1)
        weight = tl.exp(score - tl.where(top == -float("inf"), 0.0, top)[:, None])
        tl.store(highest + place, top)
        tl.store(sums + place, tl.sum(weight, 1))
        base = v + batch.to(tl.int64) * stride_vb + head.to(tl.int64) * stride_vh
        values = load_keys(base, key, fits, stride_vt, WIDTH_V, WIDTH_V_PAD)
        part = multiply(weight.to(values.dtype), values, NATIVE)
        column = tl.arange(0, WIDTH_V_PAD)
        at = place[:, None] * WIDTH_V + column[None, :]
        tl.store(outputs + at, part.to(outputs.dtype.element_ty), mask=(column < WIDTH_V)[None, :])


@triton.jit
def merged(top, total, output, new_top, new_total, new_output):
    """Two parts of the same rows."""
    both = tl.maximum(top, new_top)
    origin = tl.where(both == -float("inf"), 0.0, both)
    old, new = tl.exp(top - origin), tl.exp(new_top - origin)
    return both, total * old + new_total * new, output * old[:, None] + new_output * new[:, None]


@triton.jit
def add_keys(
    top, total, output, query, query_sq, strengths, softenings, k, v, key, fits, meant,
    stride_kt, stride_vt, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, WIDTH_PAD: tl.constexpr,
    WIDTH_V_PAD: tl.constexpr, LAW: tl.constexpr, LIFTED: tl.constexpr, NATIVE: tl.constexpr,
):
    key_rows = load_keys(k, key, fits, stride_kt, WIDTH, WIDTH_PAD)
    product = multiply(query, tl.trans(key_rows), NATIVE)
    score = law_scores(
        product, query_sq, squares(key_rows, LAW), strengths, softenings, LAW, LIFTED
    )
    score = tl.where(meant & fits[None, :], score, -float("inf"))
    new_top = tl.max(score, 1)
    weight = tl.exp(score - tl.where(new_top == -float("inf"), 0.0, new_top)[:, None])
    values = load_keys(v, key, fits, stride_vt, WIDTH_V, WIDTH_V_PAD)
    part = multiply(weight.to(values.dtype), values, NATIVE)
    return merged(top, total, output, new_top, tl.sum(weight, 1), part)


@triton.jit
def merge_kernel(
    q, k, v, strength, softening, radius, places, first, last, allowed, outputs, highest, sums,
    out, log_sums, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, stride_vb,
    stride_vh, stride_vt, queries, keys, key_heads, first_rows, choices, GROUPS: tl.constexpr,
    WINDOW: tl.constexpr, SINKS: tl.constexpr, DENSE: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_V: tl.constexpr, WIDTH_PAD: tl.constexpr, WIDTH_V_PAD: tl.constexpr, LAW: tl.constexpr,
    LIFTED: tl.constexpr, NATIVE: tl.constexpr, TILE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr,
):
    """Program: `TILE` rows of a batch row and key head. out `[B, G * GROUPS, Tq, Dv]`; log_sums
    `[B, G * GROUPS, Tq]`, the logarithms of the sums of weights, infinite where a row sees
    nothing; None: nobody asks."""
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
    time = rows // GROUPS
    own = tl.load(last + batch * queries + time)
    begin = tl.load(first + batch * first_rows + tl.minimum(time, first_rows - 1))
    begin = tl.where(own < 0, keys, begin)
    lowest = near_from(own, begin, WINDOW, DENSE)
    k += batch * stride_kb + head.to(tl.int64) * stride_kh
    v += batch * stride_vb + head.to(tl.int64) * stride_vh
    top = tl.full([TILE], -float("inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    output = tl.zeros([TILE, WIDTH_V_PAD], tl.float32)
    # The window, then the sinks.
    for start in range(tl.min(lowest), tl.max(own) + 1, BLOCK_N):
        key = start + tl.arange(0, BLOCK_N)
        fits = key < keys
        if allowed is not None:
            fits = fits & (tl.load(allowed + batch * keys + key, mask=fits, other=0) != 0)
        meant = (key[None, :] >= lowest[:, None]) & (key[None, :] <= own[:, None])
        top, total, output = add_keys(
            top, total, output, query, query_sq, strengths, softenings, k, v, key, fits, meant,
            stride_kt, stride_vt, WIDTH, WIDTH_V, WIDTH_PAD, WIDTH_V_PAD, LAW, LIFTED, NATIVE,
        )
    for start in range(tl.min(begin), tl.max(tl.where(own < 0, -1, begin + SINKS)), BLOCK_S):
        key = start + tl.arange(0, BLOCK_S)
        fits = key < keys
        if allowed is not None:
            fits = fits & (tl.load(allowed + batch * keys + key, mask=fits, other=0) != 0)
        meant = (key[None, :] >= begin[:, None]) & (key[None, :] < begin[:, None] + SINKS)
        meant = meant & (key[None, :] < lowest[:, None])
        top, total, output = add_keys(
            top, total, output, query, query_sq, strengths, softenings, k, v, key, fits, meant,
            stride_kt, stride_vt, WIDTH, WIDTH_V, WIDTH_PAD, WIDTH_V_PAD, LAW, LIFTED, NATIVE,
        )
    column = tl.arange(0, WIDTH_V_PAD)
    wide = (column < WIDTH_V)[None, :]
    base = (head_of_batch.to(tl.int64) * queries + time) * choices
    for choice in range(0, choices):
        place = tl.load(places + base + choice, mask=alive, other=-1)
        chosen = place >= 0
        part_row = tl.where(chosen, place + rows % GROUPS, 0).to(tl.int64)
        new_top = tl.load(highest + part_row, mask=chosen, other=-float("inf"))
        new_total = tl.load(sums + part_row, mask=chosen, other=0.0)
        at = part_row[:, None] * WIDTH_V + column[None, :]
        part = tl.load(outputs + at, mask=chosen[:, None] & wide, other=0.0).to(tl.float32)
        top, total, output = merged(top, total, output, new_top, new_total, part)
    output = output / tl.where(total == 0.0, 1.0, total)[:, None]
    heads = head_of_batch.to(tl.int64) * GROUPS + rows % GROUPS
    at = (heads * queries + time)[:, None] * WIDTH_V + column[None, :]
    tl.store(out + at, output.to(out.dtype.element_ty), mask=alive[:, None] & wide)
    if log_sums is not None:
        log_sum = tl.where(total == 0.0, float("inf"), top + tl.log(total))
        tl.store(log_sums + heads * queries + time, log_sum, mask=alive)
