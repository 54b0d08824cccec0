"""Routes of all heads at once, and without waiting for the device: see `..routing`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..selecting import Selection

# Rows of a tile, one for each query head of each query.
TILE = 64


class DeviceTiles(NamedTuple):
    """rows: int32 `[tiles * TILE]`, query times group size plus the head's place in its group; -1
    where a place is empty. block: int32 `[tiles]`, of `B * G * blocks`, and beyond them where a
    tile is not used. places: int32 `[B, G, Tq, N]`, where the first row of each choice lies; -1
    where there is none. ends: int64 `[B * G * blocks]`, the number of tiles up to each block's
    last one."""

    rows: Tensor
    block: Tensor
    places: Tensor
    ends: Tensor


def device_tiles(selection: Selection, groups: int) -> DeviceTiles:
    blocks, device = selection.blocks, selection.blocks.device
    batch, key_heads, queries, choices = blocks.shape
    count = -(-selection.visible.keys // selection.budget.block_size)
    every = batch * key_heads * count
    head = torch.arange(batch * key_heads, device=device).view(batch, key_heads, 1, 1)
    codes = torch.where(blocks < 0, every, blocks + head * count).flatten().to(torch.int32)
    codes, order = codes.sort(stable=True)
    edges = torch.arange(every + 1, dtype=torch.int32, device=device)
    starts = torch.searchsorted(codes, edges)
    sizes = starts.diff() * groups
    tiles = (sizes + TILE - 1) // TILE
    ends = tiles.cumsum(0)
    most = -(-codes.shape[0] * groups // TILE) + every
    block = torch.searchsorted(ends, torch.arange(most, device=device), right=True)
    used = codes < every
    code = codes.long().clamp(max=every - 1)
    rank = torch.arange(codes.shape[0], device=device) - starts[code]
    first = TILE * (ends - tiles)[code] + rank * groups
    # Choices that are none go behind the last tile.
    first = torch.where(used, first, most * TILE)
    rows = torch.full((most * TILE + groups,), -1, dtype=torch.int32, device=device)
    inside = torch.arange(groups, device=device)
    query = (order // choices) % queries
    target = first.unsqueeze(1) + inside
    rows.scatter_(0, target.flatten(), (query.unsqueeze(1) * groups + inside).flatten().int())
    places = torch.empty_like(codes)
    places.scatter_(0, order, torch.where(used, first, -1).to(torch.int32))
    places = places.view(batch, key_heads, queries, choices)
    return DeviceTiles(rows, block.to(torch.int32), places, ends)
