"""The constants of gravity of one attention: a strength and a softening for each head."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.reference import compute_dtype
from .float32 import Float32

# Where the strength is 0 its root has no gradient.
_SMALLEST_STRENGTH = 1e-12


class HeadTerms(NamedTuple):
    """`mass` `[H]`, the root of the strength; `softening` `[H]`, in units of squared distance."""

    mass: Tensor
    softening: Tensor


class HeadGravity(Float32):
    """What gives the heads of an attention their gravity.

    A child of its own, so that peft can train and store it: `modules_to_save=["gravity"]`. State:
    `gamma` `[H]`, strength = softplus; `softening_log` `[H]` where it is learned, softening =
    softplus + `floor`.

    Args:
        heads: `H`.
        law: "power" or "force", for those who read it.
        strength, softening: at the start; of a learned softening more than `floor`.
        learn_softening: else it stays as it is.
        floor: least softening where it is learned.
    """

    softening_log: nn.Parameter

    def __init__(
        self,
        heads: int,
        law: str,
        *,
        strength: float,
        softening: float,
        learn_softening: bool,
        floor: float,
    ) -> None:
        super().__init__()
        self.heads, self.law = heads, law
        self.strength_start, self.softening = float(strength), softening
        self.learns_softening, self.floor = learn_softening, floor
        for name, value in self.initial_values().items():
            self.register_parameter(name, nn.Parameter(value))

    def initial_values(self) -> dict[str, Tensor]:
        """Of a new model's parameters, by their names."""
        values = {"gamma": self._full(_inverse_softplus(self.strength_start))}
        if self.learns_softening:
            values["softening_log"] = self._full(_inverse_softplus(self.softening - self.floor))
        return values

    def strength(self) -> Tensor:
        """`[H]`."""
        return F.softplus(self.gamma)

    def forward(self) -> HeadTerms:
        strength = self.strength()
        if self.learns_softening:
            softening = F.softplus(self.softening_log) + self.floor
        else:
            softening = torch.full_like(strength, self.softening)
        return HeadTerms(strength.clamp(min=_SMALLEST_STRENGTH).sqrt(), softening)

    def extra_repr(self) -> str:
        return f"law={self.law}, heads={self.heads}"

    def _full(self, value: float) -> Tensor:
        dtype = compute_dtype(torch.get_default_dtype())
        return torch.full((self.heads,), value, dtype=dtype)


def _inverse_softplus(value: float) -> float:
    # Where exp would overflow the two are the same.
    return math.log(math.expm1(value)) if value < 30 else float(value)
