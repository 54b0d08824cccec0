"""The closed forms: where a head's distances lie, and the mass whose slope there is the host's.

Around a squared distance D, gravity's score falls with d^2 at slope `M^2/(D+eps)^2` (force) or
`M^2/(D+eps)` (power); the host's `scaling * q.k` falls at slope `scaling/2`. Equal slopes give the
mass. D is the mean squared distance under the host's own attention weights: the KL between the two
attentions is, to second order, the variance of their score difference under those weights, and a
tangent taken at their mean keeps it smallest. (The plain mean over all pairs, where hardly any
attention falls, makes the near keys far too heavy.)
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..layers.parameters import GravityParameters, GravityTerms
from .observers import Moments


class HeadGeometry(NamedTuple):
    """Where the distances of each head lie. Float64 CPU tensors, units of squared distance.

    `mean_distance` `[H]`: mean under the host's attention. `scale` `[H]`: `mean |q|^2 + R^2`
    (lifted) or `mean |q|^2 + mean |k|^2`; a softness factor f means a softening of `f * scale`.
    `radius_sq` `[Hkv]`, None when euclidean. `reach_sq` `[H]`: no squared distance seen exceeds it.
    `scaling`: what the host multiplies q.k with.
    """

    mean_distance: Tensor
    scale: Tensor
    radius_sq: Tensor | None
    reach_sq: Tensor
    scaling: float

    def softening(self, factor: Tensor | float, epsilon: float) -> Tensor:
        """`[..., H]` for softness factors that broadcast against `[H]`."""
        return (factor * self.scale).clamp(min=epsilon)

    def mass(self, softening: Tensor, law: str) -> Tensor:
        """The closed form, `[..., H]`."""
        typical = self.mean_distance + softening
        if law == "force":
            return typical * (self.scaling / 2.0) ** 0.5
        return (typical * self.scaling / 2.0).sqrt()


class Solution(NamedTuple):
    """What one attention module gets: `mass` `[masses]`, `factor` `[H]` (softness), `softening`
    `[H]`, float64 on the CPU, and the geometry they were solved on."""

    mass: Tensor
    factor: Tensor
    softening: Tensor
    geometry: HeadGeometry

    def terms(self) -> GravityTerms:
        """As the operator takes them: float32, one mass per query head."""
        heads, radius = self.softening.shape[0], self.geometry.radius_sq
        mass = self.mass.repeat_interleave(heads // self.mass.shape[0])
        return GravityTerms(
            mass.float(), self.softening.float(), None if radius is None else radius.float()
        )


def head_geometry(
    name: str, seen: Moments, distance: str, key_radius_sq: Tensor | None = None
) -> HeadGeometry:
    """The geometry behind running sums. Lifted keys take `key_radius_sq` `[Hkv]` where they have
    one already, else the longest key seen.

    Raises:
        ValueError: a statistic that is not finite; `name` is the attention module to blame.
    """
    if not seen.queries.any():
        raise ValueError(
            f"{name}: expected batches in which some query sees some key, got none: their "
            "masks hide everything from this module"
        )
    sums = {key: value.cpu() for key, value in seen.sums.items()}
    longest_key_sq = seen.longest_key_sq.cpu()
    groups = sums["dot"].shape[0] // longest_key_sq.shape[0]
    sphere_sq = longest_key_sq if key_radius_sq is None else key_radius_sq.double().cpu()
    mean_query_sq = sums["query_sq"] / seen.queries
    # Keys beyond the sphere reach as far as they are long.
    farthest = torch.maximum(longest_key_sq, sphere_sq).repeat_interleave(groups)
    if distance == "lifted":
        kappa = key_scale = sphere_sq.repeat_interleave(groups)
    else:
        kappa = sums["attended_key_sq"] / seen.queries
        key_scale = (sums["key_sq"] / seen.keys).repeat_interleave(groups)
    mean_distance = (mean_query_sq + kappa - 2.0 * sums["dot"] / seen.queries).clamp(min=0.0)
    reach_sq = (seen.longest_query_sq.cpu().sqrt() + farthest.sqrt()).square()
    geometry = HeadGeometry(
        mean_distance,
        mean_query_sq + key_scale,
        sphere_sq if distance == "lifted" else None,
        reach_sq,
        seen.scaling,
    )
    for field, value in geometry._asdict().items():
        if isinstance(value, Tensor) and not value.isfinite().all():
            raise ValueError(
                f"{name}: {field}: expected finite statistics, got {value.tolist()}. Queries or "
                "keys overflow on these batches"
            )
    return geometry


def closed_form(
    module: GravityParameters, geometry: HeadGeometry, law: str, factor: float, epsilon: float
) -> Solution:
    """One softness factor for all heads; masses at the module's granularity: the mean over the
    heads that share one."""
    softening = geometry.softening(factor, epsilon)
    mass = geometry.mass(softening, law).view(module.mass_count, -1).mean(-1)
    return Solution(mass, torch.full_like(softening, factor), softening, geometry)
