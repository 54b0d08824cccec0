"""Codes of 2, 4 or 8 bits in whole bytes."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = (2, 4, 8)


def packed_bytes(width: int, bits: int) -> int:
    """Bytes that `width` codes of so many bits take."""
    return -(-width * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 `[..., width]`, each below 2^bits, to `[..., bytes]`. Byte j holds codes j, j + bytes,
    ...: so what is taken out again lies in whole parts next to each other."""
    per_byte = 8 // bits
    size = packed_bytes(codes.shape[-1], bits)
    missing = size * per_byte - codes.shape[-1]
    if missing:
        codes = torch.nn.functional.pad(codes, (0, missing))
    parts = codes.split(size, -1)
    packed = parts[0].clone()
    for place, part in enumerate(parts[1:], 1):
        packed |= part << (place * bits)
    return packed


def unpack(packed: Tensor, bits: int, width: int) -> Tensor:
    """The codes uint8 `[..., width]` that `pack` was given."""
    if bits == 8:
        return packed
    mask = 2**bits - 1
    parts = [packed >> (place * bits) for place in range(8 // bits)]
    return (torch.cat(parts, -1) & mask)[..., :width]
