"""Sparse attention block by block: each block of keys with the queries that chose it.

A query's softmax is put together from parts: one for every block that it chose, one for its window
and sinks. Each part is the highest score, the sum and the output of its keys alone; how they are
merged is the same for every query. Products grow with the chosen pairs only. For CPUs, and for
gradients.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..blocks import ranges
from ..precision import exact_products
from ..reference import compute_dtype
from .laws import Law, Vectors, law_of, vectors_of
from .routing import STRIP, TILE, Strips, Tiles, routes, strips
from .scores import Gravity, Score
from .selecting import Selection, whole_blocks

# Elements of gathered vectors and scores held at a time: what a second-level cache takes.
_ELEMENTS = 2**18


class Group(NamedTuple):
    """One batch row and key-value head. queries: `[Tq + 1, g, E]`, the last one zeros. keys `[Tk,
    E]`, values `[Tk, Dv]`; blocks of them `[blocks, block_size, ...]`."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    key_blocks: Tensor
    value_blocks: Tensor
    law: Law


class Batch(NamedTuple):
    """Some tiles: their queries `[t * TILE]` and blocks `[t]`. Of the `partial` ones among them,
    int64 `[h]`, some keys are `hidden`, bool `[h, TILE, 1, block_size]`."""

    where: slice
    queries: Tensor
    block: Tensor
    partial: Tensor
    hidden: Tensor


@dataclass(frozen=True, eq=False)
class Plan:
    """What a call visits; nothing that has a gradient. strips: one for each batch row."""

    selection: Selection
    kind: str
    strips: list[Strips]

    def group(self, vectors: Vectors, v: Tensor, row: int, head: int) -> Group:
        size = self.selection.budget.block_size
        groups = vectors.q.shape[1] // v.shape[1]
        heads = slice(head * groups, (head + 1) * groups)
        queries = F.pad(vectors.q[row, heads].transpose(0, 1), (0, 0, 0, 0, 0, 1)).contiguous()
        keys, values = vectors.k[row, head].contiguous(), v[row, head].contiguous()
        blocks = (self._in_blocks(x, row, size) for x in (keys, values))
        return Group(queries, keys, values, *blocks, law_of(self.kind, vectors, heads))

    def first_key(self, row: int) -> int:
        origin = self.selection.visible.origin
        return 0 if origin is None else int(origin[row if origin.shape[0] > 1 else 0])

    def _in_blocks(self, x: Tensor, row: int, size: int) -> Tensor:
        first = self.first_key(row)
        whole = x[first:]
        return F.pad(whole, (0, 0, 0, -whole.shape[0] % size)).unflatten(0, (-1, size))

    def tiles(self, row: int, head: int) -> Tiles:
        keys = self.selection.visible.keys - self.first_key(row)
        return routes(
            self.selection.blocks[row, head], -(-keys // self.selection.budget.block_size)
        )

    def batches(self, tiles: Tiles, row: int, width: int) -> Iterator[Batch]:
        """width: elements that a place of a tile takes. `where` counts places."""
        partial, hidden = self._restricted(tiles, row)
        numbers = partial.tolist()
        step = max(1, _ELEMENTS // (TILE * width))
        for part in ranges(tiles.block.shape[0], step):
            low, high = (bisect.bisect_left(numbers, x) for x in (part.start, part.stop))
            yield Batch(
                slice(part.start * TILE, part.stop * TILE),
                tiles.queries[part].flatten(),
                tiles.block[part],
                partial[low:high] - part.start,
                hidden[low:high],
            )

    def _restricted(self, tiles: Tiles, row: int) -> tuple[Tensor, Tensor]:
        """The tiles with keys that are not for all of their queries, int64 `[h]`, and which these
        are: sinks and windows, which are not visited here, and what a mask hides."""
        budget, seen, origin = self.selection.budget, self.selection.visible, self.first_key(row)
        first, last = (x[row if x.shape[0] > 1 else 0] for x in (seen.first, seen.last))
        lowest = F.pad(first.expand(last.shape[0]) + budget.sinks - origin, (0, 1))
        highest = F.pad(last - budget.window - origin, (0, 1), value=seen.keys)
        start = (tiles.block * budget.block_size).unsqueeze(1)
        lowest, highest = lowest[tiles.queries] - start, highest[tiles.queries] - start
        cut = (lowest > 0) | (highest < budget.block_size - 1)
        queries = allowed = None
        if seen.allowed is not None:
            count = -(-seen.keys // budget.block_size)
            whole = whole_blocks(seen.allowed, seen.origin, budget.block_size, count)
            whole, allowed = (x[row if x.shape[0] > 1 else 0] for x in (whole, seen.allowed))
            # The empty places of a tile belong to no query.
            queries = tiles.queries.clamp(max=whole.shape[0] - 1)
            cut = cut | ~whole[queries, tiles.block.unsqueeze(1)]
        partial = cut.any(1).nonzero().squeeze(1)
        place = torch.arange(budget.block_size, device=start.device)
        lowest, highest = lowest[partial, :, None], highest[partial, :, None]
        hidden = (place < lowest) | (place > highest)
        if allowed is not None:
            key = (start[partial, :, None] + place + origin).clamp(max=seen.keys - 1)
            hidden = hidden | ~allowed[queries[partial].unsqueeze(2), key]
        return partial, hidden.unsqueeze(2)


def plan_of(selection: Selection, score: Score, dtype: torch.dtype) -> Plan | None:
    """None where `strips` has none."""
    kind = score.law if isinstance(score, Gravity) else "dot"
    found = []
    for row in range(selection.blocks.shape[0]):
        part = strips(selection, row, dtype)
        if part is None:
            return None
        found.append(part)
    return Plan(selection, kind, found)


def routed_attention(q: Tensor, k: Tensor, v: Tensor, score: Score, plan: Plan) -> Tensor:
    """Shapes as in `sparse_attention`; first derivatives for q, k, v and the score's tensors."""
    dtype = compute_dtype(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        vectors = vectors_of(q, k, score, dtype)
        output = _Routed.apply(*vectors, v.to(dtype), plan)
    return output.to(v.dtype)


class _Routed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, strength, softening, v, plan):
        output, log_sums = forward(Vectors(q, k, strength, softening), v, plan)
        ctx.save_for_backward(q, k, strength, softening, v, output, log_sums)
        ctx.plan = plan
        return output

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        from .routed_gradients import backward

        *vectors, v, output, log_sums = ctx.saved_tensors
        return (*backward(Vectors(*vectors), v, ctx.plan, output, log_sums, grad), None)


def forward(vectors: Vectors, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
    """The output `[B, H, Tq, Dv]`, and the logarithm of each row's sum of weights `[B, H, Tq]`."""
    batch, key_heads, _, width = v.shape
    groups, queries = vectors.q.shape[1] // key_heads, vectors.q.shape[2]
    output = v.new_empty(batch, key_heads, groups, queries, width)
    log_sums = v.new_empty(batch, key_heads, groups, queries)
    with exact_products(v.device):
        for row in range(batch):
            for head in range(key_heads):
                group = plan.group(vectors, v, row, head)
                merged, log_sum = _attend(group, plan, row, head)
                output[row, head] = merged.transpose(0, 1)
                log_sums[row, head] = log_sum.mT
    return output.flatten(1, 2), log_sums.flatten(1, 2)


class Parts(NamedTuple):
    """outputs `[P, g, Dv]`, highest scores and sums `[P, g]`: of the places of all tiles, then of
    the queries' strips, then one that is empty."""

    outputs: Tensor
    highest: Tensor
    sums: Tensor


def _attend(group: Group, plan: Plan, row: int, head: int) -> tuple[Tensor, Tensor]:
    """`[Tq, g, Dv]` and `[Tq, g]`."""
    tiles, local = plan.tiles(row, head), plan.strips[row]
    queries, groups, width = group.queries.shape[0] - 1, *group.queries.shape[1:]
    places, strip_places = tiles.queries.numel(), local.keys.shape[0] * STRIP
    total = places + strip_places + 1
    parts = Parts(
        group.values.new_empty(total, groups, group.values.shape[1]),
        group.values.new_empty(total, groups),
        group.values.new_empty(total, groups),
    )
    size = group.key_blocks.shape[1]
    for batch in plan.batches(tiles, row, groups * (2 * width + size)):
        scores = group.law.scores_(tile_products(group, batch))
        hide_(scores, batch)
        _write(scores, take(group.value_blocks, batch.block), parts, batch.where)
    where = slice(places, places + strip_places)
    scores = group.law.scores_(strip_products(group, local)).add_(local.bias.unsqueeze(2))
    _write(scores, group.values[local.keys], parts, where)
    parts.outputs[-1], parts.highest[-1], parts.sums[-1] = 0.0, -float("inf"), 0.0
    own = torch.arange(places, places + queries, device=tiles.places.device)
    absent = tiles.places.masked_fill(tiles.places == places, total - 1)
    return _merged(parts, torch.cat([absent, own.unsqueeze(1)], 1))


def tile_products(group: Group, batch: Batch) -> Tensor:
    """`[t, TILE, g, block_size]`."""
    groups, width = group.queries.shape[1:]
    queries = take(group.queries, batch.queries).view(-1, TILE * groups, width)
    keys = take(group.key_blocks, batch.block)
    return torch.bmm(queries, keys.mT).unflatten(1, (TILE, groups))


def hide_(scores: Tensor, batch: Batch) -> None:
    if batch.partial.shape[0] > 0:
        some = scores.index_select(0, batch.partial).masked_fill_(batch.hidden, -float("inf"))
        scores.index_copy_(0, batch.partial, some)


def take(x: Tensor, index: Tensor) -> Tensor:
    """`x[index]`, in rows as wide as they are."""
    return x.flatten(1).index_select(0, index).unflatten(1, x.shape[1:])


def strip_products(group: Group, local: Strips) -> Tensor:
    """`[strips, STRIP, g, S]`."""
    groups = group.queries.shape[1]
    queries = strip_rows(group.queries[:-1], local)
    products = queries.flatten(1, 2) @ group.keys[local.keys].mT
    return products.unflatten(1, (STRIP, groups))


def strip_rows(x: Tensor, local: Strips) -> Tensor:
    """Of `[Tq, g, ...]` by strips: `[strips, STRIP, g, ...]`, filled up with zeros."""
    missing = local.keys.shape[0] * STRIP - x.shape[0]
    return F.pad(x, (*[0, 0] * (x.dim() - 1), 0, missing)).unflatten(0, (-1, STRIP))


def _write(scores: Tensor, values: Tensor, parts: Parts, where: slice) -> None:
    """The softmax of `[n, rows, g, keys]`, which are overwritten, with values `[n, keys, Dv]`."""
    highest = scores.amax(-1, keepdim=True).clamp_(min=torch.finfo(scores.dtype).min)
    weights = scores.sub_(highest).exp_()
    parts.highest[where] = highest.flatten(0, 1).squeeze(-1)
    parts.sums[where] = weights.sum(-1).flatten(0, 1)
    torch.bmm(
        weights.flatten(1, 2),
        values,
        out=parts.outputs[where].view(weights.shape[0], -1, values.shape[2]),
    )


def _merged(parts: Parts, places: Tensor) -> tuple[Tensor, Tensor]:
    """Of queries whose parts lie at `places` `[Tq, N + 1]`."""
    groups = parts.sums.shape[1]
    highest = parts.highest[places]
    top = highest.amax(1, keepdim=True)
    factor = (highest - top).exp_()
    total = (factor * parts.sums[places]).sum(1)
    dead = total == 0
    factor = factor / total.masked_fill(dead, 1.0).unsqueeze(1)
    index = places.unsqueeze(1) * groups + torch.arange(groups, device=places.device)[:, None]
    output = F.embedding_bag(
        index.flatten(0, 1),
        parts.outputs.flatten(0, 1),
        mode="sum",
        per_sample_weights=factor.transpose(1, 2).flatten(0, 1).contiguous(),
    )
    log_sum = top.squeeze(1) + total.log()
    # A row that sees nothing: whatever its weights are taken from, they are 0.
    return output.unflatten(0, (-1, groups)), log_sum.masked_fill(dead, float("inf"))
