"""Where the particles of an NGT are: coordinates, their maps and tables, always float32 or more."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...layers.float32 import Float32, without_autocast


class Float32Linear(Float32, nn.Linear):
    """A map between coordinates."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device.type):
            return super().forward(x)


class Float32LayerNorm(Float32, nn.LayerNorm):
    """Of coordinates."""


class MassEmbedding(Float32, nn.Embedding):
    """One number for each token type; the mass is its softplus."""


class CoordinateTable(Float32, nn.Embedding):
    """Learned places `[L, C]`, one for each position."""

    def sinusoids(self, base: float) -> Tensor:
        """What it may start as; see `sinusoids`."""
        places = torch.arange(self.num_embeddings, device=self.weight.device)
        return sinusoids(places, self.embedding_dim, base, self.weight.dtype)


class Geometry(NamedTuple):
    """What the attention of a layer is told about the particles.

    coordinates: `z` `[B, T, C]`. anchors: `p` `[b, T, C]`, b being 1 where all rows have the same
    positions; None where no layer reads them. masses: `m` `[B, T]`; None where all are 1.
    log_masses: `ln(m + 1e-6)` under the power law. times: `t` `[b, T]`, where masses fade.
    implementation: the operator's.
    """

    coordinates: Tensor
    anchors: Tensor | None
    masses: Tensor | None
    log_masses: Tensor | None
    times: Tensor | None
    implementation: str


def sinusoids(places: Tensor, width: int, base: float, dtype: torch.dtype) -> Tensor:
    """`[..., width]` of integer places `[...]`: entries 2k, 2k + 1 are sine and cosine of
    `t base^(-2k / width)`. A last odd entry is a sine."""
    pairs = torch.arange((width + 1) // 2, device=places.device, dtype=dtype)
    angles = places.to(dtype).unsqueeze(-1) * (pairs * (-2.0 * math.log(base) / width)).exp()
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)[..., :width]


def normalised(x: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension, without weights."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)
