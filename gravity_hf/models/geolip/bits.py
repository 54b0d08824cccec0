"""Small integers packed without gaps: `[..., F]` values of given widths as `[..., bytes]`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_BYTE = 8
# Rows unpacked at once: bits take eight times the room of what they are packed in.
_ROWS = 1 << 14
_WIDEST = 24


def packed_bytes(widths: Sequence[int]) -> int:
    """Bytes that one row of values of these widths takes up: whole ones."""
    return -(-sum(widths) // _BYTE)


def pack_bits(values: Tensor, widths: Sequence[int]) -> Tensor:
    """Write each row's values one after the other, highest bit first, and fill up the last byte.

    Args:
        values: `[..., F]`, integers, `0 <= values[..., f] < 2^widths[f]`.
        widths: bits of each value, 0 to 24.

    Returns:
        uint8 `[..., packed_bytes(widths)]`, contiguous, with a storage of its own.

    Raises:
        ValueError: widths that do not fit the values, or values that do not fit their widths.
    """
    sizes = _checked(widths)
    if values.is_floating_point() or values.dim() < 1 or values.shape[-1] != len(sizes):
        raise ValueError(
            f"pack_bits: expected integers [..., {len(sizes)}], one for each width, got "
            f"{values.dtype} {list(values.shape)}"
        )
    limits = torch.tensor([1 << w for w in sizes], device=values.device)
    if values.numel() and bool(((values < 0) | (values >= limits)).any()):
        raise ValueError(
            "pack_bits: expected values in [0, 2^width), got some beyond. Give them more bits"
        )
    owner, place = _layout(sizes, values.device)
    rows = values.reshape(-1, len(sizes))
    powers = (1 << torch.arange(_BYTE - 1, -1, -1, device=values.device)).to(torch.int16)
    size = packed_bytes(sizes)
    packed = torch.empty(len(rows), size, dtype=torch.uint8, device=values.device)
    for start in range(0, len(rows), _ROWS):
        bits = (rows[start : start + _ROWS, owner].int() >> place) & 1
        bits = torch.nn.functional.pad(bits, (0, size * _BYTE - bits.shape[1])).to(torch.int16)
        whole = (bits.view(-1, size, _BYTE) * powers).sum(-1)
        packed[start : start + _ROWS] = whole.to(torch.uint8)
    return packed.view(*values.shape[:-1], size)


def unpack_bits(packed: Tensor, widths: Sequence[int]) -> Tensor:
    """The values that `pack_bits` wrote, int32 `[..., F]`.

    Raises:
        ValueError: `packed` is not uint8 `[..., packed_bytes(widths)]`.
    """
    sizes = _checked(widths)
    size = packed_bytes(sizes)
    if packed.dtype != torch.uint8 or packed.dim() < 1 or packed.shape[-1] != size:
        raise ValueError(
            f"unpack_bits: expected uint8 [..., {size}], got {packed.dtype} {list(packed.shape)}"
        )
    owner, place = _layout(sizes, packed.device)
    shifts = torch.arange(_BYTE - 1, -1, -1, device=packed.device, dtype=torch.int16)
    rows = packed.reshape(-1, size)
    values = torch.zeros(len(rows), len(sizes), dtype=torch.int32, device=packed.device)
    for start in range(0, len(rows), _ROWS):
        bits = (rows[start : start + _ROWS, :, None].to(torch.int16) >> shifts) & 1
        bits = bits.flatten(1)[:, : len(owner)].int() << place
        values[start : start + _ROWS].index_add_(1, owner, bits)
    return values.view(*packed.shape[:-1], len(sizes))


def _checked(widths: Sequence[int]) -> list[int]:
    sizes = list(widths)
    strange = [w for w in sizes if not isinstance(w, int) or not 0 <= w <= _WIDEST]
    if strange or not sum(sizes):
        raise ValueError(
            f"widths: expected integers of 0 to {_WIDEST} bits, one of them not 0, got {sizes!r}"
        )
    return sizes


def _layout(widths: list[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """For each bit of a row in order: which value it is of, and which of its bits."""
    owner = [index for index, width in enumerate(widths) for _ in range(width)]
    place = [bit for width in widths for bit in range(width - 1, -1, -1)]
    return (
        torch.tensor(owner, device=device),
        torch.tensor(place, dtype=torch.int32, device=device),
    )
