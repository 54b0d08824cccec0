"""The trainable terms of gravity attention: one small module per attention module."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import EPSILON_FLOOR, GravityConfig

_HALF = (torch.float16, torch.bfloat16)


class GravityTerms(NamedTuple):
    """What one attention module adds to q, k, v. `mass` `[H]`; `softening` `[H]`, in units of
    squared distance; `key_radius_sq` `[Hkv]` for lifted keys, else None. All float32."""

    mass: Tensor
    softening: Tensor
    key_radius_sq: Tensor | None


def inverse_softplus(value: Tensor) -> Tensor:
    """`x` with `softplus(x) = value`, for positive values, without overflow."""
    return value + torch.log(-torch.expm1(-value))


class GravityParameters(nn.Module):
    """Masses, softenings and key radii of one attention module.

    Call it to get them: offloading and peft both depend on the call, so nobody reads the tensors
    directly in a forward pass. Parameters are float32 whatever the host's dtype, and stay it under
    `model.to(torch.bfloat16)`: a calibrated mass in bfloat16 would be off by 0.4 %, which is a
    change of temperature.

    State: `mass_log` `[H]`, `[Hkv]` or `[1]` (by `config.mass_per`), mass = softplus;
    `softening_log` `[H]` where `config.learn_softening`, softening = softplus;
    `key_radius_sq` `[Hkv]` (persistent buffer) where `config.distance == "lifted"`.
    """

    softening_log: nn.Parameter
    key_radius_sq: Tensor

    def __init__(
        self,
        config: GravityConfig,
        query_heads: int,
        key_value_heads: int,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.query_heads = query_heads
        self.key_value_heads = key_value_heads
        # Set only while calibration or transfer watches: its `attend(call)` decides what the
        # attention module goes on with. None: gravity.
        self.observer: Any = None
        kind = {"dtype": torch.float32, "device": device}
        self.mass_log = nn.Parameter(torch.full((self.mass_count,), config.mass_init, **kind))
        if config.learn_softening:
            start = config.epsilon + math.log(-math.expm1(-config.epsilon))
            self.softening_log = nn.Parameter(torch.full((query_heads,), start, **kind))
        if config.distance == "lifted":
            self.register_buffer("key_radius_sq", torch.full((key_value_heads,), math.nan, **kind))

    @property
    def mass_count(self) -> int:
        counts = {"query_head": self.query_heads, "kv_head": self.key_value_heads, "layer": 1}
        return counts[self.config.mass_per]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GravityParameters:
        """What `to`, `half`, `bfloat16` call: moves as in torch, never rounds to half precision."""

        def without_rounding(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            rounds = result.dtype in _HALF and tensor.dtype not in _HALF
            return tensor.to(result.device) if rounds else result

        return super()._apply(without_rounding, recurse)

    def forward(self) -> GravityTerms:
        shared = self.query_heads // self.mass_count
        mass = F.softplus(self.mass_log.float().repeat_interleave(shared))
        if self.config.learn_softening:
            softening = F.softplus(self.softening_log.float()).clamp(min=EPSILON_FLOOR)
        else:
            softening = torch.full_like(mass, self.config.epsilon)
        radius = self.key_radius_sq.float() if self.config.distance == "lifted" else None
        return GravityTerms(mass, softening, radius)

    def extra_repr(self) -> str:
        return (
            f"law={self.config.law}, distance={self.config.distance}, heads={self.query_heads}, "
            f"masses={self.mass_count}"
        )
