"""Rows of a factor in codes of 2 to 8 bits: turned, scaled in groups, rounded to levels, packed.

A turn by an orthogonal matrix makes the coordinates of any row look like draws of one Gaussian, so
that a codebook made for Gaussians (Lloyd, 1957, published 1982; Max, 1960) fits all of them.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.code_packing import pack, packed_bytes, unpack
from ..ops.precision import exact_products
from ..ops.rotated_codec import rotation

CODEBOOKS = ("gaussian", "uniform")
WIDTHS = (2, 3, 4, 5, 6, 7, 8)
GROUPS = (16, 32, 64, 128)

# Widths that do not divide a byte are kept as two or three planes that do.
_PLANES = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}
# Coordinates that are turned together: enough to look Gaussian, few enough to be fast.
_LARGEST_TURN = 256
# A group's scale in one byte: sixteenths of a power of two from 2^-8 to just under 2^8, as a
# multiple of the row's root mean square.
_STEPS_PER_OCTAVE, _LOWEST = 16, -8
# Steps around the root mean square (or below the largest coordinate) that are tried.
_TRIED = {"gaussian": range(-4, 5), "uniform": range(1, -24, -2)}


class Coded(NamedTuple):
    """Rows in codes. `codes [r, bytes]` uint8, `scales [r, groups]` uint8, `norms [r]` float32:
    the root mean square of each row."""

    codes: Tensor
    scales: Tensor
    norms: Tensor


@dataclass(frozen=True)
class FactorCodec:
    """How rows are coded.

    Args:
        bits: of a code, 2 to 8.
        codebook: "gaussian" for the levels with the least squared error of a Gaussian, "uniform"
            for levels at equal distances.
        group: coordinates along the row that share a scale: 16, 32, 64 or 128. Rows are filled up
            with zeros to a multiple of it.
        seed: of the turn.

    Raises:
        ValueError: a setting that is none of these.
    """

    bits: int
    codebook: str = "gaussian"
    group: int = 32
    seed: int = 42

    def __post_init__(self) -> None:
        allowed = {"bits": WIDTHS, "codebook": CODEBOOKS, "group": GROUPS}
        for name, values in allowed.items():
            if getattr(self, name) not in values:
                raise ValueError(
                    f"FactorCodec.{name}: expected one of {values}, got {getattr(self, name)!r}"
                )

    def padded(self, width: int) -> int:
        """Coordinates of a row of that width as it is coded."""
        return -(-width // self.group) * self.group

    def bytes_per_row(self, width: int) -> int:
        """Bytes of the codes of one row."""
        return sum(packed_bytes(self.padded(width), plane) for plane in _PLANES[self.bits])

    @torch.no_grad()
    def encode(self, rows: Tensor) -> Coded:
        """`[r, width]`, finite, any float dtype, to codes. Computed in float32."""
        rows = rows.float()
        # In float64, as squares of small numbers vanish in float32.
        norms = rows.double().square().mean(-1).sqrt().float()
        usable = norms.clamp_min(torch.finfo(torch.float32).tiny)[:, None]
        turned = self._turned(rows / usable)
        scales, codes = self._fitted(turned.unflatten(-1, (-1, self.group)))
        return Coded(self._packed(codes.flatten(-2)), scales, norms)

    @torch.no_grad()
    def decode(self, coded: Coded, width: int) -> Tensor:
        """The rows `[r, width]`, float32."""
        levels = self._levels(coded.codes.device)
        codes = self._unpacked(coded.codes, self.padded(width)).unflatten(-1, (-1, self.group))
        groups = levels[codes.int()] * _scale_of(coded.scales)[..., None]
        return self._turned_back(groups.flatten(-2))[:, :width] * coded.norms[:, None]

    def _turned(self, rows: Tensor) -> Tensor:
        rows = torch.nn.functional.pad(rows, (0, self.padded(rows.shape[-1]) - rows.shape[-1]))
        turn = self._turn(rows)
        with exact_products(rows.device):
            return (rows.unflatten(-1, (-1, len(turn))) @ turn).flatten(-2)

    def _turned_back(self, rows: Tensor) -> Tensor:
        turn = self._turn(rows)
        with exact_products(rows.device):
            return (rows.unflatten(-1, (-1, len(turn))) @ turn.T).flatten(-2)

    def _turn(self, rows: Tensor) -> Tensor:
        """The orthogonal matrix of the largest power of two that fits a whole number of times."""
        size = self.group
        while size < _LARGEST_TURN and rows.shape[-1] % (2 * size) == 0:
            size *= 2
        return rotation(size, self.seed, rows.device)

    def _fitted(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Scales `[r, groups]` and codes `[r, groups, group]` with the least squared error."""
        levels = self._levels(groups.device)
        borders = (levels[1:] + levels[:-1]) / 2
        if self.codebook == "gaussian":
            size = groups.square().mean(-1).sqrt()
        else:
            size = groups.abs().amax(-1)
        middle = (size.clamp_min(2.0**_LOWEST).log2() - _LOWEST) * _STEPS_PER_OCTAVE
        best: list[Tensor] = []
        for step in _TRIED[self.codebook]:
            scales = (middle + step).round().clamp(0, 255).to(torch.uint8)
            scale = _scale_of(scales)[..., None]
            codes = torch.bucketize(groups / scale, borders)
            error = (levels[codes] * scale - groups).square().sum(-1)
            found = [scales, codes.to(torch.uint8), error]
            if best:
                better = error < best[-1]
                masks = (better, better[..., None], better)
                found = [
                    torch.where(mask, new, old)
                    for mask, new, old in zip(masks, found, best, strict=True)
                ]
            best = found
        return best[0], best[1]

    def _levels(self, device: torch.device) -> Tensor:
        if self.codebook == "uniform":
            return torch.linspace(-1, 1, 2**self.bits, device=device)
        return gaussian_levels(self.bits).to(device)

    def _packed(self, codes: Tensor) -> Tensor:
        parts, place = [], 0
        for plane in _PLANES[self.bits]:
            parts.append(pack((codes >> place) & (2**plane - 1), plane))
            place += plane
        return torch.cat(parts, -1)

    def _unpacked(self, packed: Tensor, width: int) -> Tensor:
        planes = _PLANES[self.bits]
        parts = packed.split([packed_bytes(width, plane) for plane in planes], -1)
        codes, place = torch.zeros_like(packed[..., :1]).expand(-1, width).clone(), 0
        for part, plane in zip(parts, planes, strict=True):
            codes |= unpack(part, plane, width) << place
            place += plane
        return codes


@functools.cache
def gaussian_levels(bits: int) -> Tensor:
    """The `2^bits` levels, ascending, float32, that code a standard Gaussian with the least squared
    error: each level is the mean of what lies nearest to it, each border halfway between two.

    Shared between callers: not to be written to.
    """
    normal = torch.distributions.Normal(
        torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    )
    count = 2**bits
    # Levels by the best density of fine quantisers, the cube root of the Gaussian's: near the end.
    places = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    levels = normal.icdf(places) * math.sqrt(3)
    for _ in range(400):
        borders = (levels[1:] + levels[:-1]) / 2
        height = torch.nn.functional.pad(normal.log_prob(borders).exp(), (1, 1))
        below = torch.nn.functional.pad(normal.cdf(borders), (1, 0))
        share = torch.nn.functional.pad(below[1:], (0, 1), value=1.0) - below
        levels = (height[:-1] - height[1:]) / share
    # A Gaussian is symmetric; so that rounding does not make its levels otherwise.
    return ((levels - levels.flip(0)) / 2).float()


def _scale_of(scales: Tensor) -> Tensor:
    return torch.exp2(scales.float() / _STEPS_PER_OCTAVE + _LOWEST)
