"""What is measured of every head for its figures: distances as they occur, contrast, KL."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..integration.closed_form import head_geometry
from ..integration.following import FollowingAgreement, FollowingMoments
from ..integration.hosts import gravity_modules
from ..integration.passes import Passes
from ..layers.parameters import GravityTerms
from ..ops.reference import gravity_score

FRACTIONS = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class HeadStatistics:
    """One head at the model's present parameters.

    `distances`: the 5, 25, 50, 75 and 95 % quantiles of squared distance over the pairs that the
    head may attend to, padding and hidden keys aside. `contrast`, `divergence` (mean KL from the
    dot product of the same queries and keys, nats): as `measure_attention` has them.
    """

    layer: str
    head: int
    law: str
    mass: float
    softening: float
    distances: tuple[float, ...]
    contrast: float
    divergence: float

    def score(self, distance_sq: Tensor) -> Tensor:
        """The law at squared distances of any shape, nats; without a host's cap on scores."""
        mass, softening = (torch.tensor([v], dtype=distance_sq.dtype) for v in self._terms)
        return gravity_score(distance_sq.reshape(1, 1, 1, -1), mass, softening, self.law).reshape(
            distance_sq.shape
        )

    @property
    def _terms(self) -> tuple[float, float]:
        return self.mass, self.softening


class Spread(FollowingAgreement):
    """`FollowingAgreement` with more quantiles of its histogram than the contrast needs."""

    def quantiles(self) -> Tensor:
        """`[H, 5]`, at `FRACTIONS`."""
        return torch.stack([self.quantile(fraction) for fraction in FRACTIONS], -1)


def measure_heads(
    model: nn.Module, batches: Iterable[Mapping[str, Any]], *, progress: bool | None = None
) -> dict[str, tuple[HeadStatistics, ...]]:
    """The heads of every converted attention module, by its name. Changes nothing.

    The model runs twice over the batches with gravity's own outputs flowing on, as in
    `measure_attention`.

    Args:
        model: patched, wrapped by peft or not.
        batches: model inputs as dicts of tensors.
        progress: True or False; None shows a bar on terminals only.

    Raises:
        RuntimeError: the model has no gravity.
        ValueError: no batches, an attention module that no batch reached, or statistics that are
            not finite.
    """
    modules = gravity_modules(model)
    if not modules:
        raise RuntimeError(
            f"measure_heads: expected a patched model, got {type(model).__name__} without gravity. "
            "Call patch_with_gravity(model) first"
        )
    with Passes("measure_heads", model, modules, batches, progress) as passes, torch.no_grad():
        passes.expect(2)
        moments = {name: FollowingMoments() for name in modules}
        passes.run(moments)
        spreads = {}
        for name, module in modules.items():
            terms = module()
            radius, distance = terms.key_radius_sq, module.config.distance
            geometry = head_geometry(name, moments[name], distance, radius)
            here = GravityTerms(
                terms.mass.float().cpu(),
                terms.softening.float().cpu(),
                None if radius is None else radius.float().cpu(),
            )
            spreads[name] = Spread(here, module.config.law, geometry.reach_sq)
        passes.run(spreads)
    return {name: _statistics(name, spread) for name, spread in spreads.items()}


def _statistics(name: str, spread: Spread) -> tuple[HeadStatistics, ...]:
    columns = zip(
        spread.terms.mass.tolist(),
        spread.terms.softening.tolist(),
        spread.quantiles().tolist(),
        spread.contrast().tolist(),
        spread.divergence().tolist(),
        strict=True,
    )
    return tuple(
        HeadStatistics(
            name, head, spread.law, mass, softening, tuple(quantiles), contrast, divergence
        )
        for head, (mass, softening, quantiles, contrast, divergence) in enumerate(columns)
    )
