"""Tile sizes, warps and pipeline stages, by kernel, dtype and width of a head.

Chosen on an H100 (`python scripts/benchmark/tiles.py`). Small tiles of four warps win there over
the usual 128 rows of eight: two programs share a processor, and one computes scores while the other
multiplies.
"""

from __future__ import annotations

import torch

Tiles = dict[str, int]


def forward_tiles(dtype: torch.dtype, width: int, plain: bool) -> Tiles:
    """Rows and keys of a tile for a head padded to `width`; `plain`: the law alone."""
    if dtype == torch.float32:
        return _tiles(64, 32, 4, 2) if width <= 128 else _tiles(32, 32, 4, 1)
    if width > 128 or not plain:
        return _tiles(64, 32, 4, 2)
    return _tiles(64, 64, 4, 3)


def query_tiles(dtype: torch.dtype, width: int) -> Tiles:
    """For the gradient of queries."""
    if dtype == torch.float32:
        return _tiles(64, 32, 4, 1) if width <= 128 else _tiles(32, 32, 4, 1)
    return _tiles(64, 64, 4, 2)


def key_tiles(dtype: torch.dtype, width: int) -> Tiles:
    """For the gradients of keys and values."""
    if dtype == torch.float32:
        return _tiles(32, 64, 4, 1) if width <= 128 else _tiles(32, 32, 4, 1)
    if width > 128:
        return _tiles(64, 64, 4, 2)
    return _tiles(64 if width <= 64 else 32, 64, 4, 3 if width <= 64 else 2)


def table_tiles(dtype: torch.dtype, width: int) -> Tiles:
    """For the gradient of a table of inverse distances."""
    side = 32 if dtype == torch.float32 or width > 128 else 64
    return _tiles(side, side, 4, 1)


def _tiles(rows: int, keys: int, warps: int, stages: int) -> Tiles:
    # Rows of 32 floats at least: the copy engine wants 128 bytes of norms and sums.
    return {"BLOCK_M": rows, "BLOCK_N": keys, "num_warps": warps, "num_stages": stages}
