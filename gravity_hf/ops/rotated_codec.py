"""Keys and values in 2, 4 or 8 bits: turned by an orthogonal matrix, then rounded in groups.

A few coordinates of keys are far larger than the others, and a grid that has to reach them is
coarse for the rest. Turning a vector spreads what is large over all coordinates, keeps every
distance and dot product, and can be undone. Each vector is coded by itself: what a code says
depends on no other vector, so codes are only ever added, cut off or moved, never written anew.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .code_packing import BITS, pack, packed_bytes, unpack
from .precision import exact_products
from .triton import triton_refusal

RANGES = ("byte", "half")
# The grid of a byte's scales: eighths of a power of two, from 2^-20 to just under 2^12.
_STEPS_PER_OCTAVE, _LOWEST = 8, -20
# In one piece: what stays in a CPU's cache; elsewhere what takes little memory beside the codes.
_NUMBERS_AT_ONCE = {"cpu": 1 << 17}
_NUMBERS_AT_ONCE_ELSEWHERE = 1 << 22
# Shares of a group's range that are tried: with few steps a finer grid can be worth more than its
# largest coordinate. The one with the least squared error is taken.
_REACHES = {2: (1.0, 0.85, 0.7, 0.6), 4: (1.0, 0.92), 8: (1.0,)}


class Packed(NamedTuple):
    """Coded vectors. All dimensions but the last ones are those of what was coded.

    codes: uint8 `[..., bytes]`, several codes in each byte.
    ranges: `[..., groups, 2]`, scale and offset of each group: float16, or uint8 (see
        `RotatedCodec.ranges`).
    """

    codes: Tensor
    ranges: Tensor

    def changed(self, change: Callable[[Tensor], Tensor]) -> Packed:
        """Both with `change` done to them."""
        return Packed(change(self.codes), change(self.ranges))


@dataclass(frozen=True)
class RotatedCodec:
    """How vectors of one width are coded.

    Args:
        width: of a vector, the head's.
        bits: of a code: 2, 4 or 8.
        group: coordinates that share a scale and an offset. Where `width` is no multiple, the
            largest divisor of it below.
        rotated: turn vectors before; False only to see what it is worth.
        seed: of the turn.
        ranges: "half" keeps scale and lowest value of a group in float16 (4 bytes). "byte" keeps
            the scale as a power of two in eighths, and the place of zero in the grid in 256 steps
            (2 bytes); codes are computed with what is kept, so that no error comes on top of the
            grid's. Its grid holds zero, and with 4 bits reaches about 6e4 to either side.

    Raises:
        ValueError: a number outside its range.
    """

    width: int
    bits: int = 4
    group: int = 64
    rotated: bool = True
    seed: int = 42
    ranges: str = "byte"

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"RotatedCodec.bits: expected one of {BITS}, got {self.bits!r}")
        if self.ranges not in RANGES:
            raise ValueError(f"RotatedCodec.ranges: expected one of {RANGES}, got {self.ranges!r}")
        for name in ("width", "group"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"RotatedCodec.{name}: expected a positive integer, got {value!r}")

    @property
    def group_width(self) -> int:
        """Coordinates in a group as it is used."""
        return next(g for g in range(min(self.group, self.width), 0, -1) if self.width % g == 0)

    @property
    def bytes_per_vector(self) -> int:
        """Of codes and ranges together."""
        groups = self.width // self.group_width
        return packed_bytes(self.width, self.bits) + groups * (4 if self.ranges == "half" else 2)

    @torch.no_grad()
    def quantize(self, vectors: Tensor) -> Packed:
        """`[..., T, width]`, any float dtype, finite, to codes. Computed in float32, in pieces.

        Raises:
            ValueError: vectors of another width.
        """
        if vectors.shape[-1] != self.width:
            raise ValueError(
                f"RotatedCodec.quantize: expected vectors {self.width} wide, got "
                f"{tuple(vectors.shape)}"
            )
        parts = [self._quantized(x) for x in vectors.split(_at_once(vectors), -2)]
        return Packed(
            torch.cat([x.codes for x in parts], -2), torch.cat([x.ranges for x in parts], -3)
        )

    def _quantized(self, vectors: Tensor) -> Packed:
        turned = vectors.float()
        if self.rotated:
            with exact_products(vectors.device):
                turned = turned @ rotation(self.width, self.seed, vectors.device)
        ranges, codes = self._fitted(turned.unflatten(-1, (-1, self.group_width)))
        return Packed(pack(codes.flatten(-2), self.bits), ranges)

    @torch.no_grad()
    def dequantize_into(self, packed: Packed, out: Tensor) -> None:
        """`dequantize` of codes `[B, H, T, bytes]` into `out` `[B, H, T, width]`, which may be part
        of something larger. On CUDA one kernel, where there is one; else in pieces."""
        if self._has_kernel(out):
            self._read_by_kernel(packed, out)
            return
        piece = _at_once(out)
        for start in range(0, packed.codes.shape[-2], piece):
            here = slice(start, start + piece)
            part = Packed(packed.codes[:, :, here], packed.ranges[:, :, here])
            out[:, :, here] = self.dequantize(part, out.dtype)

    def _has_kernel(self, out: Tensor) -> bool:
        if out.device.type != "cuda" or out.stride(-1) != 1:
            return False
        if triton_refusal(out.device, out.dtype) is not None:
            return False
        from .triton.rotated import DTYPES, WIDTHS

        return self.width in WIDTHS and out.dtype in DTYPES

    def _read_by_kernel(self, packed: Packed, out: Tensor) -> None:
        from .triton.rotated import read_codes

        turn = None
        if self.rotated:
            turn = rotation_in(self.width, self.seed, out.device, out.dtype)
        read_codes(
            *(*packed, turn, out),
            bits=self.bits,
            group=self.group_width,
            lowest=_LOWEST,
            steps=_STEPS_PER_OCTAVE,
        )

    @torch.no_grad()
    def dequantize(self, packed: Packed, dtype: torch.dtype = torch.float32) -> Tensor:
        """The vectors `[..., width]` in `dtype`. The turn back is a product in `dtype`."""
        scale, lowest = self._read_ranges(packed.ranges)
        codes = unpack(packed.codes, self.bits, self.width).unflatten(-1, (-1, self.group_width))
        turned = (codes * scale).add_(lowest).flatten(-2).to(dtype)
        if not self.rotated:
            return turned
        with exact_products(turned.device):
            return turned @ rotation_in(self.width, self.seed, turned.device, dtype).T

    def _fitted(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Ranges as they are kept and codes `[..., groups, group_width]`, the best of the reaches
        of this many bits."""
        low = groups.amin(-1, keepdim=True)
        high = groups.amax(-1, keepdim=True)
        if self.ranges == "byte":
            low, high = low.clamp(max=0.0), high.clamp(min=0.0)
        best: list[Tensor] = []
        for reach in _REACHES[self.bits]:
            kept = self._kept_ranges(low * reach, high * reach)
            scale, lowest = self._read_ranges(kept)
            codes = ((groups - lowest) / scale).round_().clamp_(0, self._most)
            error = (codes * scale).add_(lowest).sub_(groups).square_().sum(-1, keepdim=True)
            found = [kept, codes.to(torch.uint8), error]
            if best:
                better = error < best[-1]
                found = [torch.where(better, x, y) for x, y in zip(found, best, strict=True)]
            best = found
        return best[0], best[1]

    @property
    def _most(self) -> int:
        return 2**self.bits - 1

    def _kept_ranges(self, low: Tensor, high: Tensor) -> Tensor:
        """`[..., groups, 1]` each to `[..., groups, 2]` as they are kept."""
        scale = (high - low) / self._most
        if self.ranges == "half":
            tiny = torch.finfo(torch.float16).tiny
            largest = torch.finfo(torch.float16).max
            both = torch.cat([scale.clamp(tiny, largest), low.clamp(-largest, largest)], -1)
            return both.half()
        steps = (scale.clamp(min=2.0**_LOWEST).log2() - _LOWEST) * _STEPS_PER_OCTAVE
        # A grid of 16 steps may end 4 % short; one of 256 would lose more than it gains.
        steps = (steps + (0.49 if self.bits == 8 else 0.0)).round_().clamp_(0, 255)
        place = -low / _scale_of(steps) / self._most * 255
        return torch.cat([steps, place.round_().clamp_(0, 255)], -1).to(torch.uint8)

    def _read_ranges(self, kept: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and lowest value, `[..., groups, 1]` each, in float32."""
        first, second = kept.float().split(1, -1)
        if self.ranges == "half":
            return first, second
        scale = _scale_of(first)
        return scale, second * scale * (-self._most / 255)


@functools.lru_cache(maxsize=32)
def rotation(width: int, seed: int, device: torch.device | str = "cpu") -> Tensor:
    """An orthogonal matrix `[width, width]` in float32, the same for the same seed everywhere.

    Of a power of two a Hadamard matrix with random signs of its rows; of others the Q of a Gaussian
    matrix's QR decomposition. Shared between callers: not to be written to.
    """
    generator = torch.Generator().manual_seed(seed)
    if width & (width - 1) == 0:
        signs = torch.randint(0, 2, (width, 1), generator=generator).double() * 2 - 1
        matrix = signs * _hadamard(width)
    else:
        gaussian = torch.randn(width, width, generator=generator, dtype=torch.float64)
        q, r = torch.linalg.qr(gaussian)
        matrix = q * r.diagonal().sign()  # makes Q unique, and uniformly distributed
    return matrix.float().to(device)


@functools.lru_cache(maxsize=32)
def rotation_in(width: int, seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`rotation` in another dtype; of float32 the same tensor."""
    return rotation(width, seed, device).to(dtype)


def _hadamard(width: int) -> Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < width:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return matrix / math.sqrt(width)


def _at_once(vectors: Tensor) -> int:
    """Tokens of `[..., T, width]` in one piece."""
    most = _NUMBERS_AT_ONCE.get(vectors.device.type, _NUMBERS_AT_ONCE_ELSEWHERE)
    return max(1, most * vectors.shape[-2] // max(1, vectors.numel()))


def _scale_of(steps: Tensor) -> Tensor:
    return torch.exp2(steps / _STEPS_PER_OCTAVE + _LOWEST)
