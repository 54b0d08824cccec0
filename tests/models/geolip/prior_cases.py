"""Priors small enough for tests, and frames for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from gravity_hf.models.geolip.configuration_prior import GeolipPriorConfig
from gravity_hf.models.geolip.modeling_prior import GeolipPrior

N, V, D = 6, 4, 3


def prior_config(**settings: Any) -> GeolipPriorConfig:
    sizes = {"num_tokens": N, "num_rows": V, "base_dim": D}
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return GeolipPriorConfig(**{**sizes, **shape, **settings})


def lively_prior(**settings: Any) -> GeolipPrior:
    """One whose last map is not zero, so that what goes in shows in what comes out."""
    torch.manual_seed(3)
    prior = GeolipPrior(prior_config(**settings)).eval()
    torch.nn.init.normal_(prior.proj_out.weight, std=0.3)
    prior.set_frame_statistics(frames(50))
    return prior


def frames(count: int, tokens: int = N, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, tokens, V, D, generator=generator), dim=-1)
