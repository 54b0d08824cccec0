"""Codes that no prior made: what a prior has to be better than."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .frames import random_frames


def uniform_codes(frames: Tensor, count: int, seed: int = 0) -> Tensor:
    """`[count, N, V, d]`, rows uniform on the sphere; of `frames` only the sizes are read."""
    generator = torch.Generator("cpu").manual_seed(seed)
    _, tokens, rows, width = frames.shape
    return random_frames((count, tokens, rows), width, generator)


def mixed_codes(frames: Tensor, count: int, seed: int = 0) -> Tensor:
    """`[count, N, V, d]`: at each place the code that some input of `frames` has there, drawn for
    each place anew: each token is real, and nothing joins them."""
    generator = torch.Generator("cpu").manual_seed(seed)
    tokens = frames.shape[1]
    chosen = torch.randint(len(frames), (count, tokens), generator=generator)
    return frames[chosen.to(frames.device), torch.arange(tokens, device=frames.device)]


def gaussian_codes(frames: Tensor, count: int, seed: int = 0) -> Tensor:
    """`[count, N, V, d]` of the normal distribution with mean and covariance of `frames`
    `[S, N, V, d]`, over all tokens of an input at once; rows put back on the sphere."""
    generator = torch.Generator("cpu").manual_seed(seed)
    codes = frames.flatten(1).double()
    mean = codes.mean(0)
    # Normal weights on what there is have its covariance, which is too large to be written down.
    weights = torch.randn(count, len(codes), generator=generator, dtype=torch.float64)
    drawn = mean + weights.to(codes) @ (codes - mean) / max(len(codes) - 1, 1) ** 0.5
    return F.normalize(drawn.unflatten(1, frames.shape[1:]), dim=-1).to(frames.dtype)


__all__ = ["gaussian_codes", "mixed_codes", "uniform_codes"]
