"""The blocks that a hard cutoff leaves of a call: keys out of a block's reach are not computed.

`reach.py` says which these are. On a CPU only, for what is left out has to be known here.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .blocks import ELEMENTS, ROWS_MASKED, Block, Sizes, Window, ranges, window_of
from .intervals import Intervals
from .reach import blocks_in_reach

# Keys are left out by this many. Fewer of them are nearer to each other, and more to gather.
KEYS = 64
# With fewer keys there are too few blocks to be worth a look.
SHORTEST = 512
# Less than this share of the blocks is not left out: blocks of fewer heads would cost as much.
WORTHWHILE = 0.125
# The same for keys between those that a block of queries sees, which are then gathered.
WORTH_GATHERING = 0.25


def near_blocks(
    sizes: Sizes, intervals: Intervals, q: Tensor, k: Tensor, radius: Tensor
) -> Iterator[Block] | None:
    """Blocks of one batch entry each, in a fixed order; None: it is not worth it.

    Args:
        q: of q', so queries times -2, `[B, H, Tq, D]`. k: `[B, N, Tk, D]`. radius: `[H]`.
    """
    if 0 in sizes or sizes.keys < SHORTEST or q.device.type != "cpu":
        return None
    rows = min(sizes.queries, max(1, ROWS_MASKED["cpu"] // sizes.groups))
    visible = _visible(sizes, intervals, rows)
    # The first batch entry stands for all: where nothing can be left out, to see that is cheap.
    first = _worked(sizes, q[:1], k[:1], radius, rows, visible[:1])
    if first.sum() > (1.0 - WORTHWHILE) * visible[:1].sum() * sizes.key_heads:
        return None
    rest = _worked(sizes, q[1:], k[1:], radius, rows, visible.expand(sizes.batch, -1, -1)[1:])
    return _blocks(sizes, intervals, torch.cat([first, rest]), rows, q.dtype)


def _worked(
    sizes: Sizes, q: Tensor, k: Tensor, radius: Tensor, rows: int, visible: Tensor
) -> Tensor:
    """Bool `[b, N, nq, nk]`: blocks that are visible, `[b|1, nq, nk]`, and in reach."""
    near = blocks_in_reach(q * -0.5, k, radius, rows, KEYS)
    # Query heads that share a key head share a block.
    near = near.unflatten(1, (sizes.key_heads, sizes.groups)).any(2)
    return near & visible.unsqueeze(1)


def _visible(sizes: Sizes, intervals: Intervals, rows: int) -> Tensor:
    """Bool `[B|1, nq, nk]`: blocks that positions let see each other."""
    lengths = sizes.batch if intervals.key_ranges is not None else 1
    first = torch.arange(0, sizes.keys, KEYS)
    visible = []
    for batch in ranges(lengths, 1):
        for row in ranges(sizes.queries, rows):
            keys = intervals.bounds(batch, row).keys
            visible.append((first < keys.stop) & (first + KEYS > keys.start))
    return torch.stack(visible).view(lengths, -1, first.shape[0])


def _blocks(
    sizes: Sizes, intervals: Intervals, worked: Tensor, rows: int, dtype: torch.dtype
) -> Iterator[Block]:
    """`worked`: of `_worked`, for the whole batch."""
    flags = worked.transpose(1, 2).tolist()
    for batch in ranges(sizes.batch, 1):
        for number, row in enumerate(ranges(sizes.queries, rows)):
            window = window_of(intervals, batch, row, None, worked.device, dtype)
            if window is None:
                continue
            for head, near in _alike(flags[batch.start][number]):
                narrow = narrowed(window, near)
                if narrow is None:
                    continue
                most = max(1, ELEMENTS["cpu"] // (sizes.groups * rows * narrow.count))
                for part in ranges(head.stop - head.start, most):
                    heads = slice(head.start + part.start, head.start + part.stop)
                    yield Block(batch, heads, row, narrow)


def _alike(flags: list[list[bool]]) -> Iterator[tuple[slice, list[bool]]]:
    """Heads one after another whose flags are the same, and these: a block can have them all."""
    start = 0
    for head in range(1, len(flags) + 1):
        if head == len(flags) or flags[head] != flags[start]:
            yield slice(start, head), flags[start]
            start = head


def narrowed(window: Window, worked: list[bool]) -> Window | None:
    """`window` without the blocks of keys whose flag in `worked` is False; None: none is left.
    Where few of these are between the others, they stay."""
    keys = window.keys
    numbers = [number for number, flag in enumerate(worked) if flag]
    if not numbers:
        return None
    first, last = numbers[0], numbers[-1]
    start, stop = max(keys.start, first * KEYS), min(keys.stop, (last + 1) * KEYS)
    if len(numbers) > (1.0 - WORTH_GATHERING) * (last + 1 - first):
        return _cut(window, slice(start, stop), None)
    index = (torch.tensor(numbers).unsqueeze(1) * KEYS + torch.arange(KEYS)).flatten()
    # Only the blocks at the ends can stand out.
    below, above = max(0, start - first * KEYS), max(0, (last + 1) * KEYS - stop)
    return _cut(window, slice(start, stop), index[below : index.shape[0] - above])


def _cut(window: Window, keys: slice, index: Tensor | None) -> Window:
    """The part of a window that `keys` holds, of it the keys `index` only."""
    if window.bias is None:
        return Window(keys, index=index)
    first = window.keys.start + window.bias_keys.start
    last = window.keys.start + window.bias_keys.stop
    if index is None:
        start, stop = max(first, keys.start), min(last, keys.stop)
        bias = window.bias[..., start - first : max(start, stop) - first]
        where = slice(start - keys.start, max(start, stop) - keys.start)
    else:
        where = slice(*torch.searchsorted(index, torch.tensor([first, last])).tolist())
        bias = window.bias[..., index[where] - first]
    if where.start == where.stop:
        return Window(keys, dead=window.dead, index=index)
    return Window(keys, bias, where, window.dead, index)
