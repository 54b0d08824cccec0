"""The constants of gravity of one layer's attention: a strength and a softening for each head."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...layers.float32 import Float32
from ...ops.reference import compute_dtype
from .configuration_checks import SOFTENING_FLOOR
from .configuration_leanformer import LeanFormerConfig

# Where the strength is 0 its root has no gradient.
_SMALLEST_STRENGTH = 1e-12


class GravityConstants(NamedTuple):
    """`mass` `[H]`, the root of the strength; `softening` `[H]`, in units of squared distance."""

    mass: Tensor
    softening: Tensor


class LeanFormerGravity(Float32):
    """What gives the heads of a layer their gravity.

    A child of its own, so that peft can train and store it: `modules_to_save=["gravity"]`. State:
    `gamma` `[H]`, strength = softplus; `softening_log` `[H]` where the config learns it,
    softening = softplus + 1e-4.
    """

    softening_log: nn.Parameter

    def __init__(self, config: LeanFormerConfig) -> None:
        super().__init__()
        self.heads, self.law = config.num_attention_heads, config.gravity_law
        self.softening, self.learns_softening = config.softening_start, config.learn_softening
        self.strength_start = float(config.gravity_strength)
        for name, value in self.initial_values().items():
            self.register_parameter(name, nn.Parameter(value))

    def initial_values(self) -> dict[str, Tensor]:
        """Of a new model's parameters, by their names."""
        values = {"gamma": self._full(_inverse_softplus(self.strength_start))}
        if self.learns_softening:
            start = _inverse_softplus(self.softening - SOFTENING_FLOOR)
            values["softening_log"] = self._full(start)
        return values

    def strength(self) -> Tensor:
        """`[H]`."""
        return F.softplus(self.gamma)

    def forward(self) -> GravityConstants:
        strength = self.strength()
        if self.learns_softening:
            softening = F.softplus(self.softening_log) + SOFTENING_FLOOR
        else:
            softening = torch.full_like(strength, self.softening)
        return GravityConstants(strength.clamp(min=_SMALLEST_STRENGTH).sqrt(), softening)

    def extra_repr(self) -> str:
        return f"law={self.law}, heads={self.heads}"

    def _full(self, value: float) -> Tensor:
        dtype = compute_dtype(torch.get_default_dtype())
        return torch.full((self.heads,), value, dtype=dtype)


def _inverse_softplus(value: float) -> float:
    # Where exp would overflow the two are the same.
    return math.log(math.expm1(value)) if value < 30 else float(value)
