"""Tiny geolips whose spectral layers matter, and tokens for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gravity_hf.models.geolip import GeolipConfig, GeolipForReconstruction, GeolipModel

B, N, P = 3, 5, 12
SMALL: dict[str, Any] = {"patch_dim": P, "num_rows": 8, "hidden_size": 16}
IMAGES: dict[str, Any] = {"patch_size": 4, "num_channels": 1, "patch_dim": None}
KINDS = ["dot_product", "gravity"]


def tokens(batch: int = B, count: int = N, width: int = P, seed: int = 0) -> Tensor:
    """`[batch, count, width]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, count, width, generator=generator)


def tiny(model_class: type = GeolipForReconstruction, **settings: Any) -> GeolipModel:
    """In evaluation. Alphas are near their bound and attention is sharp, so that tokens feel each
    other; of gravity the softening is small."""
    torch.manual_seed(0)
    if settings.get("spectral_attention") == "gravity":
        settings = {"gravity_softening": 0.1, **settings}
    model = model_class(GeolipConfig(**{"alpha_init": 4.0, **SMALL, **settings})).eval()
    with torch.no_grad():
        for layer in model.spectral.layers:
            layer.qkv.weight *= 4
            layer.out_proj.weight *= 4
    return model


def mask_of(*lengths: int, count: int = N) -> Tensor:
    """`[B, count]`, ones for the first tokens of each sample."""
    return (torch.arange(count) < torch.tensor(lengths)[:, None]).long()


def train(model: GeolipModel, steps: int, lr: float = 3e-3) -> GeolipModel:
    """On random tokens; in evaluation afterwards."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    model.train()
    for step in range(steps):
        loss = model(tokens(4, N, model.config.patch_dim, seed=step)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()
