"""Which blocks of pairs FlexAttention visits: from each query's interval of keys, in memory that
grows with the number of blocks. `create_block_mask` of torch would write out all pairs first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

# Torch's own default, which its kernels are tuned for.
BLOCK = 128


def block_mask(
    queries: int, keys: int, causal: bool, key_ranges: Tensor | None, device: torch.device
) -> object | None:
    """A `BlockMask` for causality and key ranges int32 `[B|1, Tq|1, 2]`, as in
    `gravity_hf.ops.api.gravity_attention`; None where every query sees every key."""
    if key_ranges is None:
        return _causal_blocks(queries, keys, device) if causal else None
    return _blocks(queries, keys, causal, key_ranges, device)


@functools.lru_cache(maxsize=32)
def _causal_blocks(queries: int, keys: int, device: torch.device) -> object:
    return _blocks(queries, keys, True, None, device)


def _blocks(
    queries: int, keys: int, causal: bool, key_ranges: Tensor | None, device: torch.device
) -> object:
    # Imported on first use: importing the package must not start a compiler.
    from torch.nn.attention.flex_attention import BlockMask

    # [B|1, query blocks, BLOCK]
    start, stop = _intervals(queries, keys, causal, key_ranges, device)
    empty = start >= stop
    first = start.masked_fill(empty, keys).amin(-1, keepdim=True)
    last = stop.masked_fill(empty, 0).amax(-1, keepdim=True)
    low = BLOCK * torch.arange(-(-keys // BLOCK), device=device)
    visited = (low < last) & (low + BLOCK > first)
    whole = (low >= start.amax(-1, keepdim=True)) & (low + BLOCK <= stop.amin(-1, keepdim=True))
    return BlockMask.from_kv_blocks(
        *_ordered(visited & ~whole),
        *_ordered(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=_visible(keys - queries, causal, key_ranges),
        seq_lengths=(queries, keys),
    )


def _intervals(
    queries: int, keys: int, causal: bool, key_ranges: Tensor | None, device: torch.device
) -> tuple[Tensor, Tensor]:
    """First and one past the last key of each query, `[B|1, query blocks, BLOCK]`; rows that fill
    up the last block see nothing."""
    position = torch.arange(queries, device=device) + keys - queries
    start, stop = torch.zeros_like(position)[None], torch.full_like(position, keys)[None]
    if key_ranges is not None:
        start = torch.maximum(start, key_ranges[..., 0])
        stop = torch.minimum(stop, key_ranges[..., 1])
    if causal:
        stop = torch.minimum(stop, position + 1)
    missing = -queries % BLOCK
    start = torch.nn.functional.pad(start, (0, missing), value=keys)
    stop = torch.nn.functional.pad(stop, (0, missing), value=0)
    return start.unflatten(-1, (-1, BLOCK)), stop.unflatten(-1, (-1, BLOCK))


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Bool `[B|1, query blocks, key blocks]` as a BlockMask has it: how many key blocks each query
    block has, `[B|1, 1, query blocks]`, and which, these first."""
    blocks = blocks[:, None].to(torch.int32)
    which = blocks.argsort(dim=-1, descending=True, stable=True)
    return blocks.sum(-1, dtype=torch.int32), which.to(torch.int32)


def _visible(shift: int, causal: bool, key_ranges: Tensor | None) -> Callable[..., Tensor]:
    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        if key_ranges is None:
            return j <= i + shift
        row = i
        b = b if key_ranges.shape[0] > 1 else b * 0
        i = i if key_ranges.shape[1] > 1 else i * 0
        inside = (j >= key_ranges[b, i, 0]) & (j < key_ranges[b, i, 1])
        return inside & (j <= row + shift) if causal else inside

    return seen
