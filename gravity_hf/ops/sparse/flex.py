"""Sparse attention through torch's FlexAttention: tiles of keys that some query of a tile chose.

Every visited tile goes through the exact mask, and all of them in the order of their keys: for a
query that chose nothing in a tile, to visit it changes nothing.
On a CPU it runs uncompiled, with memory `Tq * Tk`, as a check on the other implementations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from ..flex import _distance, _many_graphs, _score_mod, _Terms
from ..flex_blocks import BLOCK, _ordered
from .scores import DotProduct, Gravity, Score
from .selecting import Selection

# The least width of a head that torch compiles.
NARROWEST = 16
# Pairs of queries and blocks that 32-bit addresses reach.
_MOST_FLAGS = 2**31


def flex_refusal(
    q: Tensor, k: Tensor, v: Tensor, score: Score, selection: Selection, dropout_p: float
) -> str | None:
    """What a call would have to be for this implementation to serve it; None: it can."""
    if dropout_p != 0:
        return f"dropout_p = 0, got {dropout_p}"
    if q.device.type != "cpu" and min(q.shape[3], v.shape[3]) < NARROWEST:
        return f"heads at least {NARROWEST} wide"
    pairs = selection.blocks.shape[1] * q.shape[0] * q.shape[2]
    if pairs * -(-k.shape[2] // selection.budget.block_size) >= _MOST_FLAGS:
        return "fewer blocks: compiled code counts pairs of queries and blocks in 32 bits"
    if q.dtype == torch.float64:
        return "float32, bfloat16 or float16, got torch.float64"
    if selection.visible.bias is not None:
        return "a mask that only hides, got one that adds to scores"
    tensors = (q, k, v, *score.tensors)
    needs_gradient = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if needs_gradient and (isinstance(score, Gravity) or q.device.type == "cpu"):
        return "no gradient, but on a GPU of a dot product: call it under torch.no_grad()"
    return None


def sparse_flex_attention(
    q: Tensor, k: Tensor, v: Tensor, score: Score, selection: Selection, dropout_p: float = 0.0
) -> Tensor:
    """Shapes as in `sparse_attention`. Gradients on a GPU, for a dot product.

    Raises:
        ValueError: what `flex_refusal` says.
    """
    refusal = flex_refusal(q, k, v, score, selection, dropout_p)
    if refusal is not None:
        raise ValueError(f"sparse_attention: impl='flex': expected {refusal}. Use impl='auto'")
    blocks = block_mask(selection, q.shape[1])
    q, k, v = (x.contiguous() for x in (q, k, v))
    terms = None
    if isinstance(score, Gravity):
        strength = score.mass.detach().float().square()[None, :, None].expand(q.shape[:3])
        distance = _distance(q, k, score.softening.detach(), score.key_radius_sq, None)
        law = (score.law, None, "clamp", None, None)
        terms = _Terms(strength.contiguous(), None, distance, None, *law)
    if q.device.type != "cpu":
        for x in (q, k, v):
            torch._dynamo.mark_static(x, [1, 3])
    scaling = score.scaling if isinstance(score, DotProduct) else 1.0
    output = _runner(q.device.type)(q, k, v, terms, blocks, scaling)
    return output.masked_fill((selection.visible.last < 0)[:, None, :, None], 0.0)


def block_mask(selection: Selection, heads: int) -> object:
    """The `BlockMask` of a selection for `heads` query heads; nothing of size `Tq * Tk` is made."""
    from torch.nn.attention.flex_attention import BlockMask

    groups = heads // selection.blocks.shape[1]
    visited = visited_tiles(selection).repeat_interleave(groups, 1)
    count, which = _ordered(visited.flatten(0, 1))
    lead = visited.shape[:2]
    return BlockMask.from_kv_blocks(
        count.view(*lead, -1),
        which.view(*lead, *which.shape[2:]),
        BLOCK_SIZE=BLOCK,
        mask_mod=_membership(selection, groups),
        seq_lengths=(selection.visible.queries, selection.visible.keys),
    )


def visited_tiles(selection: Selection) -> Tensor:
    """Bool `[B, G, query tiles, key tiles]`: tiles of 128 with a selected pair in them."""
    seen, budget = selection.visible, selection.budget
    batch, key_heads = selection.blocks.shape[:2]
    start = selection.blocks * budget.block_size
    if seen.origin is not None:
        start = start + seen.origin[:, None, None, None]
    empty = selection.blocks < 0
    ends = [
        (start, start + budget.block_size - 1, empty),
        *(
            (low[:, None, :, None], high[:, None, :, None], (seen.last < 0)[:, None, :, None])
            for low, high in (
                (seen.first, seen.first + budget.sinks - 1),
                (seen.last - budget.window + 1, seen.last),
            )
        ),
    ]
    tiles = -(-seen.keys // BLOCK)
    key = BLOCK * torch.arange(tiles, device=start.device)
    visited = None
    for low, high, absent in ends:
        low = low.clamp(min=0).masked_fill(absent, seen.keys + BLOCK)
        high = high.clamp(max=seen.keys - 1)
        found = _any_interval(*torch.broadcast_tensors(low, high), key, tiles)
        found = found.expand(batch, key_heads, -1, -1)
        visited = found if visited is None else visited | found
    return visited


def _any_interval(low: Tensor, high: Tensor, key: Tensor, tiles: int) -> Tensor:
    """Bool `[b, g, query tiles, key tiles]`: which a query's intervals `[b, g, Tq, N]` touch."""
    missing = -low.shape[2] % BLOCK
    pad = (0, 0, 0, missing)
    low = torch.nn.functional.pad(low, pad, value=tiles * BLOCK + BLOCK) // BLOCK
    high = torch.nn.functional.pad(high, pad, value=-1).div(BLOCK, rounding_mode="floor")
    # Where an interval begins one is added, and taken away behind its end.
    shape = (*low.shape[:2], low.shape[2] // BLOCK, tiles + 1)
    steps = torch.zeros(shape, dtype=torch.int32, device=low.device)
    meant = high >= low
    for places, step in ((low, 1), (high + 1, -1)):
        places = places.masked_fill(~meant, tiles).clamp(max=tiles)
        places = places.unflatten(2, (-1, BLOCK)).flatten(3)
        steps.scatter_add_(3, places, torch.full_like(places, step, dtype=torch.int32))
    return steps.cumsum(3)[..., :tiles] > 0


def _membership(selection: Selection, groups: int) -> Callable[..., Tensor]:
    seen, budget, flags = selection.visible, selection.budget, selection.block_flags()
    first, last, allowed, origin = seen.first, seen.last, seen.allowed, seen.origin
    size, window, sinks = budget.block_size, budget.window, budget.sinks

    def member(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        end = last[b * (last.shape[0] > 1), i]
        begin = first[b * (first.shape[0] > 1), i * (first.shape[1] > 1)]
        place = j if origin is None else j - origin[b * (origin.shape[0] > 1)]
        block = torch.clamp(place, min=0) // size
        chosen = flags[b, h // groups, i, block] & (place >= 0)
        inside = (j >= begin) & (j <= end)
        if allowed is not None:
            inside = inside & allowed[b * (allowed.shape[0] > 1), i * (allowed.shape[1] > 1), j]
        return inside & (chosen | (j > end - window) | (j < begin + sinks))

    return member


@functools.cache
def _runner(device_type: str) -> Callable[..., Tensor]:
    """Imported and compiled on first use: importing the package must not start a compiler."""
    from torch.nn.attention.flex_attention import flex_attention

    def run(
        q: Tensor, k: Tensor, v: Tensor, terms: _Terms | None, blocks: object, scaling: float
    ) -> Tensor:
        options: dict[str, object] = {}
        if q.is_cuda and q.dtype == torch.float32:
            options["FLOAT32_PRECISION"] = "'ieee'"
        if q.is_cuda:
            options["FORCE_USE_FLEX_ATTENTION"] = True
        return flex_attention(
            q,
            k,
            v,
            score_mod=None if terms is None else _score_mod(terms),
            block_mask=blocks,
            scale=scaling,
            enable_gqa=q.shape[1] != k.shape[1],
            kernel_options=options or None,
        )

    return run if device_type == "cpu" else _many_graphs(torch.compile(run))
