"""Tile sizes, warps and pipeline stages, by kernel, dtypes and widths of a head.

Chosen on an H100 (`python scripts/benchmark/tiles.py`), and for narrow float32 vectors beside
values in half precision on an H200 (with `--ngt --law power --dropout 0.1`). Small tiles of four
warps win there over the usual 128 rows of eight: two programs share a processor, and one computes
scores while the other multiplies. Devices with less shared memory get the first choice that fits
it. In the backward the general code has more values for each pair: its tiles are half as large,
with which compiled code for an H100 keeps (nearly) all of them in registers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch

Tiles = dict[str, int]
Choice = tuple[int, int, int, int]

WIDEST = 256
_SMALLEST: Choice = (32, 32, 4, 1)

# Beside the tiles: norms, sums, barriers.
_BESIDE = 6 * 1024


@dataclass(frozen=True)
class Widths:
    """What a row of q or k and one of v take: dtypes, and widths as padded in a kernel."""

    vectors: torch.dtype
    values: torch.dtype
    width_k: int
    width_v: int

    @property
    def width(self) -> int:
        return max(self.width_k, self.width_v)

    @property
    def mixed(self) -> bool:
        return self.vectors != self.values

    @property
    def narrow(self) -> bool:
        """float32 vectors as narrow as NGT's, beside values in half precision."""
        return self.mixed and self.width_k <= 16 and self.width_v <= 64

    @property
    def vector_bytes(self) -> int:
        return self.width_k * self.vectors.itemsize

    @property
    def value_bytes(self) -> int:
        return self.width_v * self.values.itemsize


def forward_tiles(widths: Widths, plain: bool, device: torch.device) -> Tiles:
    """Rows and keys of a tile; `plain`: the code for the law alone."""
    if widths.values == torch.float32:
        choices = [(64, 32, 4, 2)] if widths.width <= 128 else [_SMALLEST]
    elif widths.mixed and widths.width_v == 32 and not plain:
        # With as many keys in a tile as values are wide, ptxas 12.8 and 12.9 (of Triton 3.6) keep
        # weights in the registers of the queries' last third where a list of tiles is read: after
        # the first tile of a list distances were wrong. 13.4 does not.
        return _first_that_fits(
            [(64, 64, 4, 2), (64, 64, 4, 1), _SMALLEST],
            widths.vector_bytes,
            widths.vector_bytes + widths.value_bytes,
            device,
        )
    elif widths.width > 128 or not plain:
        choices = [(64, 32, 4, 2)]
    elif widths.narrow:
        choices = [(128, 64, 4, 2), (64, 64, 4, 2)]
    else:
        choices = [(64, 64, 4, 3), (64, 64, 4, 2)]
    kept, moving = widths.vector_bytes, widths.vector_bytes + widths.value_bytes
    return _first_that_fits([*choices, (64, 32, 4, 1), _SMALLEST], kept, moving, device)


def query_tiles(widths: Widths, plain: bool, device: torch.device) -> Tiles:
    """For the gradient of queries."""
    if widths.values == torch.float32:
        choices = [(64, 32, 4, 1)] if widths.width <= 128 else []
    elif not plain and widths.width <= 128:
        choices = [(64, 32, 4, 2), (64, 32, 4, 1)]
    else:
        choices = [(64, 64, 4, 2), (64, 64, 4, 1), (64, 32, 4, 1)]
    both = widths.vector_bytes + widths.value_bytes
    return _first_that_fits([*choices, _SMALLEST], both, both, device)


def key_tiles(widths: Widths, plain: bool, device: torch.device) -> Tiles:
    """For the gradients of keys and values."""
    if widths.values == torch.float32:
        choices = [(32, 64, 4, 1)] if widths.width <= 128 else []
    elif not plain and widths.width <= 128:
        choices = [(32, 64, 4, 2)]
    elif widths.width > 128:
        choices = [(64, 64, 4, 2), (64, 64, 4, 1)]
    else:
        stages = 2 if widths.narrow else 3
        choices = [(64, 64, 4, stages)] if widths.width <= 64 else [(32, 64, 4, 2)]
    both = widths.vector_bytes + widths.value_bytes
    choices = [*choices, (32, 64, 4, 1), _SMALLEST]
    return _first_that_fits(choices, both, both, device, keys_stay=True)


def table_tiles(dtype: torch.dtype, width: int, device: torch.device) -> Tiles:
    """For the gradient of a table of inverse distances; `width` is that of values."""
    choices = [] if dtype == torch.float32 or width > 128 else [(64, 64, 4, 1)]
    return _first_that_fits([*choices, _SMALLEST], 0, 2 * width * dtype.itemsize, device)


def fits(
    dtype: torch.dtype, width: int, device: torch.device, vectors: torch.dtype | None = None
) -> bool:
    """Whether every kernel has tiles for heads of this width on a device; `vectors`: the dtype of
    q and k where that is not the one of v."""
    padded = 1 << max(width - 1, 1).bit_length()
    if padded > WIDEST:
        return False
    widths = Widths(vectors or dtype, dtype, padded, padded)
    both = widths.vector_bytes + widths.value_bytes
    limit = _shared_bytes(device)
    return limit == 0 or _needed_bytes(_SMALLEST, both, both) <= limit


def _first_that_fits(
    choices: list[Choice],
    kept: int,
    moving: int,
    device: torch.device,
    keys_stay: bool = False,
) -> Tiles:
    """`kept`: bytes of a row of what a program keeps a tile of; `moving`: of what each stage has a
    tile of. Rows are those of queries, or of keys where these stay."""
    limit = _shared_bytes(device)
    for choice in choices:
        if limit == 0 or _needed_bytes(choice, kept, moving, keys_stay) <= limit:
            break
    return _named(choice)


def _needed_bytes(choice: Choice, kept: int, moving: int, keys_stay: bool = False) -> int:
    rows, keys, _, stages = choice
    staying, passing = (keys, rows) if keys_stay else (rows, keys)
    return kept * staying + stages * moving * passing + _BESIDE


def _named(choice: Choice) -> Tiles:
    # 32 rows and keys at least: the copy engine wants 128 bytes of norms and sums.
    return dict(zip(("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"), choice, strict=True))


@lru_cache(maxsize=64)
def _shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may have; 0 in the interpreter, where there is no limit."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin
