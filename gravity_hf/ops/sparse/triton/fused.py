"""A decoding step in two kernels: scores of blocks, then the choice and attention to it.

Choosing by single operations starts some seventy kernels for a handful of queries. Here each query
and key-value head has one program that ranks its blocks and goes through what it chose.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...triton.problem import interpreted
from ..budget import KeyBudget
from ..scores import DotProduct, Score
from .attention import _padded, _terms
from .kernels import add_keys, load_keys, load_rows
from .ranking import best_of

# Blocks that a program scores, and keys of the window that it looks at together.
_BLOCKS, _KEYS = 32, 64


# fmt: off
@triton.jit
def block_scores_kernel(
    q, k, scores, stride_qb, stride_qh, stride_qt, stride_kb, stride_kh, stride_kt, queries, keys,
    blocks, key_heads, GROUPS: tl.constexpr, SIZE: tl.constexpr, WIDTH: tl.constexpr,
    WIDTH_PAD: tl.constexpr, NEAREST: tl.constexpr, KEPT: tl.constexpr, BLOCKS: tl.constexpr,
):
    """Program: some blocks of a query and key head. scores float32 `[B, G, Tq, blocks]`; k holds
    screening keys, or with KEPT their means `[B, G, blocks, ds]`."""
    lead = tl.program_id(1)
    time = lead % queries
    head = lead // queries % key_heads
    batch = (lead // queries // key_heads).to(tl.int64)
    column = tl.arange(0, WIDTH_PAD)
    query = tl.zeros([WIDTH_PAD], tl.float32)
    q += batch * stride_qb + time.to(tl.int64) * stride_qt
    for member in range(0, GROUPS):
        at = (head * GROUPS + member).to(tl.int64) * stride_qh
        query += tl.load(q + at + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    query = query / GROUPS
    block = tl.program_id(0) * BLOCKS + tl.arange(0, BLOCKS)
    k += batch * stride_kb + head.to(tl.int64) * stride_kh
    if KEPT:
        mean = load_keys(k, block, block < blocks, stride_kt, WIDTH, WIDTH_PAD).to(tl.float32)
    else:
        mean = tl.zeros([BLOCKS, WIDTH_PAD], tl.float32)
        for inside in range(0, SIZE):
            key = block * SIZE + inside
            mean += load_keys(k, key, key < keys, stride_kt, WIDTH, WIDTH_PAD).to(tl.float32)
        mean = mean / SIZE
    score = tl.sum(mean * query[None, :], 1)
    if NEAREST:
        score = 2.0 * score - tl.sum(mean * mean, 1)
    tl.store(scores + lead.to(tl.int64) * blocks + block, score, mask=block < blocks)


@triton.jit
def chosen_keys_kernel(
    q, k, v, strength, softening, radius, scores, out, stride_qb, stride_qh, stride_qt, stride_kb,
    stride_kh, stride_kt, stride_vb, stride_vh, stride_vt, queries, keys, blocks, key_heads,
    GROUPS: tl.constexpr, SIZE: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr,
    COUNT: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr, WIDTH_PAD: tl.constexpr,
    WIDTH_V_PAD: tl.constexpr, LAW: tl.constexpr, LIFTED: tl.constexpr, NATIVE: tl.constexpr,
    TILE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCKS: tl.constexpr, INDEX_BITS: tl.constexpr,
):
    """Program: a query and key head. out `[B, G * GROUPS, Tq, Dv]`. Each query sees more keys than
    its window and sinks."""
    lead = tl.program_id(0)
    time = lead % queries
    head = lead // queries % key_heads
    batch = (lead // queries // key_heads).to(tl.int64)
    own = keys - queries + time
    member = tl.arange(0, TILE)
    alive = member < GROUPS
    rows = time * GROUPS + tl.where(alive, member, 0)
    query, query_sq, strengths, softenings = load_rows(
        q + batch * stride_qb, rows, alive, head, strength, softening, radius,
        stride_qh, stride_qt, GROUPS, WIDTH, WIDTH_PAD, LAW, LIFTED,
    )
    k += batch * stride_kb + head.to(tl.int64) * stride_kh
    v += batch * stride_vb + head.to(tl.int64) * stride_vh
    top = tl.full([TILE], -float("inf"), tl.float32)
    total = tl.zeros([TILE], tl.float32)
    output = tl.zeros([TILE, WIDTH_V_PAD], tl.float32)
    for start in range(0, WINDOW, BLOCK_W):
        key = own - WINDOW + 1 + start + tl.arange(0, BLOCK_W)
        fits = key <= own
        top, total, output = add_keys(
            top, total, output, query, query_sq, strengths, softenings, k, v, key, fits,
            alive[:, None], stride_kt, stride_vt, WIDTH, WIDTH_V, WIDTH_PAD, WIDTH_V_PAD, LAW,
            LIFTED, NATIVE,
        )
    for start in range(0, SINKS, BLOCK_S):
        key = start + tl.arange(0, BLOCK_S)
        top, total, output = add_keys(
            top, total, output, query, query_sq, strengths, softenings, k, v, key, key < SINKS,
            alive[:, None], stride_kt, stride_vt, WIDTH, WIDTH_V, WIDTH_PAD, WIDTH_V_PAD, LAW,
            LIFTED, NATIVE,
        )
    if COUNT > 0:
        block = tl.arange(0, BLOCKS)
        real = block < blocks
        score = tl.load(scores + lead.to(tl.int64) * blocks + block, mask=real, other=0.0)
        end = block * SIZE + SIZE
        whole = real & (end > SINKS) & (end <= own + 1) & (end - SIZE <= own - WINDOW)
        chosen = best_of(score[None, :], whole[None, :], block, COUNT, 1, INDEX_BITS)
        order = tl.cumsum(chosen.to(tl.int32), 1)
        for choice in range(0, COUNT):
            this = chosen & (order == choice + 1)
            # -1 where there are no more, whose keys are none.
            number = tl.sum(tl.sum(tl.where(this, block[None, :] + 1, 0), 1), 0) - 1
            inside = tl.arange(0, BLOCK_N)
            key = number * SIZE + inside
            fits = (inside < SIZE) & (key >= SINKS) & (key <= own - WINDOW)
            top, total, output = add_keys(
                top, total, output, query, query_sq, strengths, softenings, k, v, key, fits,
                alive[:, None], stride_kt, stride_vt, WIDTH, WIDTH_V, WIDTH_PAD, WIDTH_V_PAD, LAW,
                LIFTED, NATIVE,
            )
    column = tl.arange(0, WIDTH_V_PAD)
    output = output / tl.where(total == 0.0, 1.0, total)[:, None]
    heads = (batch * key_heads + head) * GROUPS + member
    at = (heads * queries + time)[:, None] * WIDTH_V + column[None, :]
    wide = (column < WIDTH_V)[None, :]
    tl.store(out + at, output.to(out.dtype.element_ty), mask=alive[:, None] & wide)
# fmt: on


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Score,
    budget: KeyBudget,
    screen: tuple[Tensor, Tensor],
    means: Tensor | None,
) -> Tensor:
    """Forward only; shapes as in `sparse_attention`, for what `fused_refusal` lets through. Weights
    are rounded to the dtype of v, as in every fused kernel; everything between is float32."""
    batch, heads, queries, width = q.shape
    key_heads, keys, width_v = v.shape[1:]
    groups, size = heads // key_heads, budget.block_size
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    blocks = -(-keys // size) if means is None else means.shape[2]
    scores = q.new_empty(batch, key_heads, queries, blocks, dtype=torch.float32)
    out = v.new_empty(batch, heads, queries, width_v)
    strength, softening, radius = _terms(q, score)
    shared = {"GROUPS": groups, "SIZE": size, "num_warps": 4}
    with torch.cuda.device_of(q):
        if budget.chosen_blocks > 0:
            _score_blocks(screen, means, scores, keys, score.metric, shared)
        padded = triton.next_power_of_2(max(blocks, 2))
        chosen_keys_kernel[(batch * key_heads * queries,)](
            q, k, v, strength, softening, radius, scores, out, *q.stride()[:3], *k.stride()[:3],
            *v.stride()[:3], queries, keys, blocks, key_heads, WINDOW=budget.window,
            SINKS=budget.sinks, COUNT=min(budget.chosen_blocks, blocks), WIDTH=width,
            WIDTH_V=width_v, WIDTH_PAD=_padded(width), WIDTH_V_PAD=_padded(width_v),
            LAW="dot" if isinstance(score, DotProduct) else score.law, LIFTED=radius is not None,
            NATIVE=not interpreted(), TILE=_padded(groups), BLOCK_N=_padded(size),
            BLOCK_S=_padded(budget.sinks), BLOCK_W=min(_KEYS, _padded(budget.window)),
            BLOCKS=padded, INDEX_BITS=padded.bit_length() - 1, **shared,
        )  # fmt: skip
    return out


def _score_blocks(
    screen: tuple[Tensor, Tensor],
    means: Tensor | None,
    scores: Tensor,
    keys: int,
    metric: str,
    shared: dict[str, int],
) -> None:
    query, key = screen[0], screen[1] if means is None else means
    query, key = (x if x.stride(3) == 1 else x.contiguous() for x in (query, key))
    batch, key_heads, queries, blocks = scores.shape
    width = query.shape[3]
    block_scores_kernel[(triton.cdiv(blocks, _BLOCKS), batch * key_heads * queries)](
        query, key, scores, *query.stride()[:3], *key.stride()[:3], queries, keys, blocks,
        key_heads, WIDTH=width, WIDTH_PAD=_padded(width), NEAREST=metric == "distance",
        KEPT=means is not None, BLOCKS=_BLOCKS, **shared,
    )  # fmt: skip
