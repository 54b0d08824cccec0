"""Addresses: the axis of a fixed codebook that each row of a frame is nearest to, and the side."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ...layers.float32 import without_autocast
from .frames import canonical


class Address(NamedTuple):
    """Of the rows of frames `[..., V, d]`.

    axis: int64 `[..., V]`, the axis with the largest `|<row, axis>|`. sign: `[..., V]`, 1 or -1, of
    that product, where the row's first coordinate beyond 1e-6 is made positive. margin: `[..., V]`,
    its size. assignment: `[..., V, K]`, softmax of all of them over the temperature. code: int64
    `[..., V]`, `sign (axis + 1)`.
    """

    axis: Tensor
    sign: Tensor
    margin: Tensor
    assignment: Tensor
    code: Tensor


def seeded_codebook(size: int, base_dim: int, seed: int) -> Tensor:
    """`[K, d]` float32: directions drawn by `seed`, on the CPU, first coordinates positive."""
    generator = torch.Generator("cpu").manual_seed(seed)
    drawn = torch.randn(size, base_dim, generator=generator, dtype=torch.float64, device="cpu")
    return canonical(F.normalize(drawn, dim=-1)).float()


@torch.no_grad()
def address_of(frame: Tensor, codebook: Tensor, temperature: float) -> Address:
    """Addresses of the rows of `frame` `[..., V, d]`; nothing learns from them."""
    rows = canonical(frame.to(codebook.dtype))
    with without_autocast(rows.device.type):
        products = rows @ codebook.T
    margins = products.abs()
    margin, axis = margins.max(-1)
    chosen = products.gather(-1, axis.unsqueeze(-1)).squeeze(-1)
    sign = torch.where(chosen < 0, -1.0, 1.0).to(chosen.dtype)
    assignment = (margins / temperature).softmax(-1)
    return Address(axis, sign, margin, assignment, (axis + 1) * sign.long())
