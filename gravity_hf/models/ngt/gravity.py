"""The constants of nature of one layer of an NGT: one set for each head."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...layers.float32 import Float32
from ...layers.observing import Observer
from ...ops.cutoff import Cutoff
from ...ops.reference import compute_dtype
from .configuration_checks import SOFTENING_FLOOR
from .configuration_ngt import NGTConfig

# Beside a mass, so that its logarithm is finite.
MASS_FLOOR = 1e-6
# Where the strength is 0 its root has no gradient.
_SMALLEST_STRENGTH = 1e-12


class GravityTerms(NamedTuple):
    """Arguments of `gravity_attention` of these names, at least float32.

    mass: `[H]`, the root of the strength `g`. query_mass, key_mass `[B, H, T]`: of the force law.
    log_key_mass `[B, H, T]`: of the power law, masses raised to `mu` and faded. None where masses
    do not enter scores.
    """

    mass: Tensor
    eps: float | Tensor
    query_mass: Tensor | None
    key_mass: Tensor | None
    log_key_mass: Tensor | None
    head_bias: Tensor | None
    cutoff: Cutoff | None


class NGTGravity(Float32):
    """What gives the heads of a layer their gravity.

    A child of its own, so that peft can train and store it: `modules_to_save=["gravity"]`. State,
    each where the config has it: `gamma` `[H]`, strength = softplus; `softening_log` `[H]`,
    softening = softplus + 1e-4; `bias` `[H]`; `mass_exponent` `[H]`; `fading` of the last heads,
    nats for each position = softplus; `radius` `[]`, of the cutoff, softplus.
    """

    softening_log: nn.Parameter
    bias: nn.Parameter
    radius: nn.Parameter
    mass_exponent: nn.Parameter
    fading: nn.Parameter

    def __init__(self, config: NGTConfig) -> None:
        super().__init__()
        self.heads = config.num_attention_heads
        self.law = config.law
        self.repulsive = config.repulsive
        self.masses_in_scores = config.token_masses and not config.mass_in_value
        self.softening, self.learns_softening = float(config.softening), config.learn_softening
        self.has_bias, self.has_exponent = config.head_bias, config.has_mass_exponent
        self.fading_heads = config.fading_heads
        self.cutoff_kind, self.cutoff_width = config.cutoff, float(config.cutoff_width)
        # Set only while somebody watches: its `attend(call)` decides what attention goes on with.
        self.observer: Observer | None = None
        for name, value in self.initial_values(config).items():
            self.register_parameter(name, nn.Parameter(value))

    def initial_values(self, config: NGTConfig) -> dict[str, Tensor]:
        """Of a new model's parameters, by their names."""
        values = {"gamma": self._full(_inverse_softplus(config.initial_strength))}
        if config.learn_softening:
            start = _inverse_softplus(config.softening - SOFTENING_FLOOR)
            values["softening_log"] = self._full(start)
        if config.head_bias:
            values["bias"] = self._full(0.0)
        if config.has_mass_exponent:
            values["mass_exponent"] = self._full(1.0)
        if self.fading_heads:
            first, heads = self.heads - self.fading_heads, self.heads
            slopes = [2.0 ** (-8.0 * (head + 1) / heads) for head in range(first, heads)]
            fading = [_inverse_softplus(slope) for slope in slopes]
            values["fading"] = torch.tensor(fading, dtype=_own_dtype())
        if config.cutoff != "none":
            values["radius"] = torch.tensor(float(config.initial_radius), dtype=_own_dtype())
        return values

    def strength(self) -> Tensor:
        """`g` `[H]`."""
        return F.softplus(self.gamma)

    def forward(
        self, masses: Tensor | None, log_masses: Tensor | None = None, times: Tensor | None = None
    ) -> GravityTerms:
        """`masses` `[B, T]`; under the power law `ln(masses + 1e-6)`, too, computed once for all
        layers; `times` `[b, T]`, positions, where masses fade with age."""
        eps: float | Tensor = self.softening
        if self.learns_softening:
            eps = F.softplus(self.softening_log) + SOFTENING_FLOOR
        cutoff = None
        if self.cutoff_kind != "none":
            radius = F.softplus(self.radius).expand(self.heads)
            cutoff = Cutoff(radius, self.cutoff_kind, self.cutoff_width)
        query_mass = key_mass = log_key_mass = None
        if self.law == "power":
            log_key_mass = self._log_key_mass(log_masses, times)
        elif masses is not None and self.masses_in_scores:
            query_mass = key_mass = masses[:, None].expand(-1, self.heads, -1)
        mass = self.strength().clamp(min=_SMALLEST_STRENGTH).sqrt()
        bias = self.bias if self.has_bias else None
        return GravityTerms(mass, eps, query_mass, key_mass, log_key_mass, bias, cutoff)

    def _log_key_mass(self, log_masses: Tensor | None, times: Tensor | None) -> Tensor | None:
        """`mu_h ln m_j + l_h t_j` `[B, H, T]`. What is missing of the age, `-l_h t_i`, is the same
        for all keys of a query, whose weights do not feel it."""
        found = None
        if log_masses is not None and self.masses_in_scores:
            found = log_masses[:, None].expand(-1, self.heads, -1)
            found = self.mass_exponent[:, None] * found if self.has_exponent else found
        if times is not None and self.fading_heads:
            rates = F.pad(F.softplus(self.fading), (self.heads - self.fading_heads, 0))
            faded = rates[:, None] * times[:, None]
            found = faded if found is None else found + faded
        return found

    def extra_repr(self) -> str:
        force = "repulsive force" if self.repulsive else self.law
        return f"law={force}, heads={self.heads}, cutoff={self.cutoff_kind}"

    def _full(self, value: float) -> Tensor:
        return torch.full((self.heads,), value, dtype=_own_dtype())


def _own_dtype() -> torch.dtype:
    """Of the constants of a new model, float32 in one of half precision, too."""
    return compute_dtype(torch.get_default_dtype())


def _inverse_softplus(value: float) -> float:
    # Where exp would overflow the two are the same.
    return math.log(math.expm1(value)) if value < 30 else float(value)
