"""Which queries each block of keys serves: the choices of a head, turned round.

The queries that chose a block are cut into tiles of a fixed number of places, so that every product
of `routed.py` has one shape, whatever was chosen: what a query gets from a block is then the same
to the last bit whichever other queries chose it, and a later token changes nothing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .selecting import Selection

# Queries of a tile, and of a strip of the local part. Fewer make slower products, more leave more
# places empty.
TILE = 64
STRIP = 64


class Tiles(NamedTuple):
    """Of one batch row and key-value head. queries: int64 `[tiles, TILE]`, `Tq` where a place
    is empty. block: int64 `[tiles]`. places: int64 `[Tq, N]`, where each query's choices went among
    `tiles * TILE`; one past the last where it made none."""

    queries: Tensor
    block: Tensor
    places: Tensor


class Strips(NamedTuple):
    """Windows and sinks of one batch row, `STRIP` queries at a time. keys: int64 `[strips, S]`.
    bias: `[strips, STRIP, S]`, 0 or -inf. `Tq` is filled up to whole strips."""

    keys: Tensor
    bias: Tensor


def routes(blocks: Tensor, count: int) -> Tiles:
    """blocks: int64 `[Tq, N]`, -1 where there is none. count: of all blocks."""
    queries, choices = blocks.shape
    chosen = blocks.masked_fill(blocks < 0, count).flatten()
    # A long row of integers is sorted by its digits, in time linear in its length.
    sorted_blocks, order = chosen.to(torch.int32).sort(stable=True)
    sorted_blocks = sorted_blocks.long()
    sizes = torch.bincount(chosen, minlength=count + 1)[:count]
    tiles = -(-sizes // TILE)
    first_tile = tiles.cumsum(0) - tiles
    first_choice = sizes.cumsum(0) - sizes
    total = int(tiles.sum())
    used = int(sizes.sum())
    order, sorted_blocks = order[:used], sorted_blocks[:used]
    place = torch.arange(used, device=blocks.device) - first_choice[sorted_blocks]
    place = place + TILE * first_tile[sorted_blocks]
    owners = place.new_full((total * TILE,), queries).scatter_(0, place, order // choices)
    places = place.new_full((queries * choices,), total * TILE).scatter_(0, order, place)
    block = torch.repeat_interleave(tiles)
    return Tiles(owners.view(total, TILE), block, places.view(queries, choices))


def strips(selection: Selection, row: int, dtype: torch.dtype) -> Strips | None:
    """Of batch row `row`; None where the last visible keys of neighbouring queries are far apart,
    or their first ones differ, so that a strip of queries has no strip of keys."""
    budget, seen = selection.budget, selection.visible
    first, last = (x[row if x.shape[0] > 1 else 0] for x in (seen.first, seen.last))
    if first.shape[0] > 1 and bool((first != first[0])[last >= 0].any()):
        return None
    start = first[int((last >= 0).to(torch.int8).argmax())] if first.shape[0] > 1 else first[0]
    missing = -last.shape[0] % STRIP
    last = torch.nn.functional.pad(last, (0, missing), value=-1).view(-1, STRIP)
    lowest = last.masked_fill(last < 0, seen.keys).amin(1)
    if bool((last.amax(1) - lowest >= STRIP).any()):
        return None
    band = torch.arange(STRIP + budget.window - 1, device=last.device)
    band = (lowest - budget.window + 1).clamp(max=seen.keys - 1).unsqueeze(1) + band
    sinks = start + torch.arange(budget.sinks, device=last.device)
    keys = torch.cat([band, sinks.expand(band.shape[0], -1)], 1).unsqueeze(1)
    own = last.unsqueeze(2)
    in_window = (keys > own - budget.window) & (keys <= own) & (keys >= start)
    is_sink = (keys <= own - budget.window) & (keys >= start)
    is_sink[..., : band.shape[1]] = False
    in_window[..., band.shape[1] :] = False
    meant = (in_window | is_sink) & (keys >= 0) & (keys < seen.keys)
    keys = keys.squeeze(1).clamp(0, seen.keys - 1)
    if seen.allowed is not None:
        meant = meant & _allowed_at(seen.allowed, row, keys)
    bias = torch.zeros(meant.shape, dtype=dtype, device=meant.device)
    return Strips(keys, bias.masked_fill_(~meant, -float("inf")))


def _allowed_at(allowed: Tensor, row: int, keys: Tensor) -> Tensor:
    """Bool `[strips, STRIP|1, S]`."""
    flags = allowed[row if allowed.shape[0] > 1 else 0]
    if flags.shape[0] == 1:
        return flags[0, keys].unsqueeze(1)
    missing = -flags.shape[0] % STRIP
    flags = torch.nn.functional.pad(flags, (0, 0, 0, missing)).view(keys.shape[0], STRIP, -1)
    return flags.gather(2, keys.unsqueeze(1).expand(-1, STRIP, -1))
