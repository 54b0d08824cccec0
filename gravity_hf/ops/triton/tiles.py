"""Tile sizes, warps and pipeline stages, by kernel, dtype and width of a head.

Chosen on an H100 (`python scripts/benchmark/tiles.py`). Small tiles of four warps win there over
the usual 128 rows of eight: two programs share a processor, and one computes scores while the other
multiplies. Devices with less shared memory get the first choice that fits it. In the backward the
general code has more values for each pair: its tiles are half as large, with which compiled code
for an H100 keeps (nearly) all of them in registers.
"""

from __future__ import annotations

from functools import lru_cache

import torch

Tiles = dict[str, int]
Choice = tuple[int, int, int, int]

WIDEST = 256
_SMALLEST: Choice = (32, 32, 4, 1)

# Beside the tiles: norms, sums, barriers.
_BESIDE = 6 * 1024


def forward_tiles(dtype: torch.dtype, width: int, plain: bool, device: torch.device) -> Tiles:
    """Rows and keys of a tile for a head padded to `width`; `plain`: the law alone."""
    if dtype == torch.float32:
        choices = [(64, 32, 4, 2)] if width <= 128 else [_SMALLEST]
    elif width > 128 or not plain:
        choices = [(64, 32, 4, 2)]
    else:
        choices = [(64, 64, 4, 3), (64, 64, 4, 2)]
    return _first_that_fits([*choices, (64, 32, 4, 1), _SMALLEST], 1, dtype, width, device)


def query_tiles(dtype: torch.dtype, width: int, plain: bool, device: torch.device) -> Tiles:
    """For the gradient of queries."""
    if dtype == torch.float32:
        choices = [(64, 32, 4, 1)] if width <= 128 else []
    elif not plain and width <= 128:
        choices = [(64, 32, 4, 2), (64, 32, 4, 1)]
    else:
        choices = [(64, 64, 4, 2), (64, 64, 4, 1), (64, 32, 4, 1)]
    return _first_that_fits([*choices, _SMALLEST], 2, dtype, width, device)


def key_tiles(dtype: torch.dtype, width: int, plain: bool, device: torch.device) -> Tiles:
    """For the gradients of keys and values."""
    if dtype == torch.float32:
        choices = [(32, 64, 4, 1)] if width <= 128 else []
    elif not plain and width <= 128:
        choices = [(32, 64, 4, 2)]
    elif width > 128:
        choices = [(64, 64, 4, 2), (64, 64, 4, 1)]
    else:
        choices = [(64, 64, 4, 3)] if width <= 64 else [(32, 64, 4, 2)]
    choices = [*choices, (32, 64, 4, 1), _SMALLEST]
    return _first_that_fits(choices, 2, dtype, width, device, keys_stay=True)


def table_tiles(dtype: torch.dtype, width: int, device: torch.device) -> Tiles:
    """For the gradient of a table of inverse distances; `width` is that of values."""
    choices = [] if dtype == torch.float32 or width > 128 else [(64, 64, 4, 1)]
    return _first_that_fits([*choices, _SMALLEST], 0, dtype, width, device)


def fits(dtype: torch.dtype, width: int, device: torch.device) -> bool:
    """Whether every kernel has tiles for heads of this width on a device."""
    padded = 1 << max(width - 1, 1).bit_length()
    if padded > WIDEST:
        return False
    limit = _shared_bytes(device)
    return limit == 0 or _needed_bytes(_SMALLEST, 2, dtype, padded) <= limit


def _first_that_fits(
    choices: list[Choice],
    staying: int,
    dtype: torch.dtype,
    width: int,
    device: torch.device,
    keys_stay: bool = False,
) -> Tiles:
    """`staying`: tensors of which a program keeps one tile; of two others each stage has a tile."""
    limit = _shared_bytes(device)
    for choice in choices:
        if limit == 0 or _needed_bytes(choice, staying, dtype, width, keys_stay) <= limit:
            break
    return _named(choice)


def _needed_bytes(
    choice: Choice, staying: int, dtype: torch.dtype, width: int, keys_stay: bool = False
) -> int:
    rows, keys, _, stages = choice
    kept, moving = (keys, rows) if keys_stay else (rows, keys)
    return width * dtype.itemsize * (staying * kept + 2 * stages * moving) + _BESIDE


def _named(choice: Choice) -> Tiles:
    # 32 rows and keys at least: the copy engine wants 128 bytes of norms and sums.
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), choice, strict=True))


@lru_cache(maxsize=64)
def _shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may have; 0 in the interpreter, where there is no limit."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
