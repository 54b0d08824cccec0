"""Which (heads, queries, keys) blocks of the score matrix exist, and what the mask adds to each.

Sizes: `B` batch, `H` query heads, `N` key heads, `G = H / N`, `Tq`, `Tk`. A block of scores is laid
out `[b, n, G, rows, keys]`, so that the query heads which share a key head share one product.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .intervals import Intervals

# Scores per block. On a CPU a block of float32 scores should stay in the second-level caches
# (1 MB); a GPU wants launches of tens of microseconds, for which 128 MB a buffer is the price.
ELEMENTS = {"cpu": 2**18, "gpu": 2**25}
# Scores above the diagonal are computed and thrown away, half a block's width on average, so causal
# blocks are short; on a CPU a dense mask is often causal, so it gets the same height.
ROWS_MASKED = {"cpu": 128, "gpu": 1024}
INFINITY = float("inf")


class Sizes(NamedTuple):
    batch: int
    key_heads: int
    groups: int
    queries: int
    keys: int


class Window(NamedTuple):
    """The keys that rows of a block can see.

    `bias` `[b|1, n|1, G|1, rows|1, keys|1]` is added to the score columns `bias_keys`, with -inf
    for hidden. `dead` rows `[b|1, n|1, G|1, rows|1, 1]` see nothing; their bias is 0, so that their
    softmax is finite. `index`, int64 and rising: of the keys these alone.
    """

    keys: slice
    bias: Tensor | None = None
    bias_keys: slice = slice(0, 0)
    dead: Tensor | None = None
    index: Tensor | None = None

    @property
    def count(self) -> int:
        """Of the keys."""
        return self.keys.stop - self.keys.start if self.index is None else self.index.shape[0]


class Block(NamedTuple):
    batch: slice
    heads: slice
    rows: slice
    window: Window


def mask_5d(mask: Tensor | None, sizes: Sizes) -> Tensor | None:
    """A mask of up to 4 dimensions as a view `[B|1, N|1, G|1, Tq|1, Tk|1]`; nothing is expanded."""
    if mask is None:
        return None
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.shape[1] == 1:
        return mask.unsqueeze(2)
    return mask.unflatten(1, (sizes.key_heads, sizes.groups))


def cut(tensor: Tensor, *slices: slice) -> Tensor:
    """Slices of the leading dimensions, where a dimension of size 1 stands for every index."""
    return tensor[
        tuple(
            slice(None) if size == 1 else part
            for size, part in zip(tensor.shape, slices, strict=False)
        )
    ]


def iterate_blocks(
    sizes: Sizes,
    mask: Tensor | None,
    intervals: Intervals,
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Block]:
    """Every block with work in it, in a fixed order (dropout depends on the order).

    `mask`: from `mask_5d`.
    """
    if 0 in sizes:
        return
    kind = "cpu" if device.type == "cpu" else "gpu"
    budget = ELEMENTS[kind]
    rows = sizes.queries
    if not intervals.everything or (mask is not None and kind == "cpu" and mask.shape[3] > 1):
        rows = min(rows, max(1, ROWS_MASKED[kind] // sizes.groups))
    reach = intervals.reach(rows)
    rows = min(rows, max(1, budget // (sizes.groups * reach)))
    heads = max(1, budget // (sizes.groups * rows * reach))
    batches = min(max(1, heads // sizes.key_heads), sizes.batch)
    heads = min(heads, sizes.key_heads)
    window = None
    for batch in ranges(sizes.batch, batches):
        for row in ranges(sizes.queries, rows):
            for head in ranges(sizes.key_heads, heads):
                # A mask without a head dimension is read once for all heads.
                if head.start == 0 or (mask is not None and mask.shape[1] > 1):
                    tile = None if mask is None else cut(mask, batch, head, slice(None), row)
                    window = window_of(intervals, batch, row, tile, device, dtype)
                if window is not None:
                    yield Block(batch, head, row, window)


def ranges(stop: int, step: int) -> Iterator[slice]:
    return (slice(start, min(start + step, stop)) for start in range(0, stop, step))


def window_of(
    intervals: Intervals,
    batch: slice,
    rows: slice,
    tile: Tensor | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Window | None:
    """`tile`: the mask's part for the block, over all keys."""
    bounds = intervals.bounds(batch, rows)
    keys = bounds.keys
    if keys.start >= keys.stop:
        return None
    partial = bounds.partial
    hidden = empty = None
    length = rows.stop - rows.start
    if tile is None and intervals.only_causal and device.type == "cpu" and not bounds.may_be_empty:
        if length == 1:
            return Window(keys)
        bias_keys = slice(keys.stop - keys.start - length + 1, keys.stop - keys.start)
        return Window(keys, _future(length, dtype), bias_keys)
    if partial.start < partial.stop:
        hidden, empty = intervals.hidden(batch, rows, partial, device)
    if tile is not None:
        bias = _additive(cut(tile, *(slice(None),) * 4, keys), dtype)
        return _masked_window(bias, keys, hidden, partial)
    if hidden is None:
        return Window(keys)
    bias = torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, -INFINITY)
    bias_keys = slice(partial.start - keys.start, partial.stop - keys.start)
    if not bounds.may_be_empty or (device.type == "cpu" and not empty.any()):
        return Window(keys, bias, bias_keys)
    return Window(keys, bias.masked_fill_(empty, 0.0), bias_keys, empty)


@functools.lru_cache(maxsize=4)
def _future(length: int, dtype: torch.dtype) -> Tensor:
    """-inf where the last `length - 1` keys that `length` causal queries see are ahead of a query.

    Kept, because making it costs a short sequence half as much as its scores.
    """
    with torch.inference_mode(False):
        hidden = torch.ones(length, length - 1, dtype=torch.bool).triu()
        bias = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, -INFINITY)
    return bias[None, None, None]


def _masked_window(
    bias: Tensor, keys: slice, hidden: Tensor | None, partial: slice
) -> Window | None:
    """`bias`: what a mask adds at `keys`; `hidden`: what positions hide at `partial`."""
    if hidden is not None:
        before, after = partial.start - keys.start, keys.stop - partial.stop
        hidden = torch.nn.functional.pad(hidden, (before, after))
        bias = torch.where(hidden, -INFINITY, bias)
    bias_keys = slice(0, keys.stop - keys.start)
    # Reading the mask to narrow the work costs a GPU a round trip and a CPU next to nothing.
    if bias.device.type == "cpu" and bias.shape[-1] > 1:
        highest, lowest = bias.amax((0, 1, 2, 3)), bias.amin((0, 1, 2, 3))
        seen = _span(highest != -INFINITY)
        if seen.start == seen.stop:
            return None
        keys = slice(keys.start + seen.start, keys.start + seen.stop)
        bias_keys = _span(((highest != 0) | (lowest != 0))[seen])
        bias = bias[..., seen][..., bias_keys]
    if bias_keys.start == bias_keys.stop:
        return Window(keys)
    if bias_keys.stop - bias_keys.start < keys.stop - keys.start:
        # Some key is visible to every row.
        return Window(keys, bias, bias_keys)
    dead = bias.amax(-1, keepdim=True) == -INFINITY
    if bias.device.type == "cpu" and not dead.any():
        return Window(keys, bias, bias_keys)
    return Window(keys, bias.masked_fill(dead, 0.0), bias_keys, dead)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What `reference.split_mask` calls hidden becomes -inf, the rest is added."""
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
            ~mask, -INFINITY
        )
    return mask.to(dtype).masked_fill(~(mask > torch.finfo(mask.dtype).min / 2), -INFINITY)


def _span(flags: Tensor) -> slice:
    """From the first to the last True of a vector; empty where there is none."""
    found = flags.nonzero()
    if found.numel() == 0:
        return slice(0, 0)
    return slice(int(found[0]), int(found[-1]) + 1)
