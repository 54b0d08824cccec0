"""The cache codec of the published LeanFormer, to compare with: nothing else here uses it.

Its facts: one orthogonal matrix as wide as all heads together; one scale and one lowest value for
each channel, over all tokens and rows at once; codes of 4 bits, a whole byte for each; and whenever
tokens are added, everything that was coded is read and coded again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .precision import exact_products
from .rotated_codec import rotation


class PublishedPacked(NamedTuple):
    """codes: uint8 `[B, T, H * D]`. scale, lowest: float32 `[H * D]`."""

    codes: Tensor
    scale: Tensor
    lowest: Tensor


@dataclass(frozen=True)
class PublishedCodec:
    """`bits` of a code, `seed` of the turn."""

    bits: int = 4
    seed: int = 42

    @torch.no_grad()
    def quantize(self, vectors: Tensor) -> PublishedPacked:
        """`[B, H, T, D]` to codes. Computed in float32."""
        flat = vectors.float().transpose(1, 2).flatten(2)
        with exact_products(flat.device):
            turned = flat @ rotation(flat.shape[-1], self.seed, flat.device)
        low, high = turned.amin((0, 1)), turned.amax((0, 1))
        scale = ((high - low) / (2**self.bits - 1)).clamp(min=1e-8)
        codes = ((turned - low) / scale).round_().clamp_(0, 2**self.bits - 1)
        return PublishedPacked(codes.to(torch.uint8), scale, low)

    @torch.no_grad()
    def dequantize(self, packed: PublishedPacked, heads: int, dtype: torch.dtype) -> Tensor:
        """The vectors `[B, heads, T, D]` in `dtype`."""
        turned = packed.codes.float() * packed.scale + packed.lowest
        with exact_products(turned.device):
            flat = turned @ rotation(turned.shape[-1], self.seed, turned.device).T
        return flat.unflatten(-1, (heads, -1)).transpose(1, 2).to(dtype)
