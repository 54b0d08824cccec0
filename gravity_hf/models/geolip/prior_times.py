"""Where on its way a flow is: times in [0, 1], drawn for training and shown to the network."""

from __future__ import annotations

import math

import torch
from torch import Tensor

# Numbers that say what time it is, before the network makes something of them.
TIME_WAVES = 64


def draw_times(count: int, generator: torch.Generator | None = None) -> Tensor:
    """`[count]`: logistic of normal numbers, so that the middle of the way, where there is most to
    find out, is seen more often than its ends; float32 on the CPU."""
    return torch.randn(count, generator=generator).sigmoid()


def time_waves(times: Tensor) -> Tensor:
    """Sinusoids `[B, 64]` of times in [0, 1], float32."""
    half = TIME_WAVES // 2
    rates = torch.exp(-math.log(10000.0) * torch.arange(half, device=times.device) / half)
    angles = 1000.0 * times.float()[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


__all__ = ["TIME_WAVES", "draw_times", "time_waves"]
