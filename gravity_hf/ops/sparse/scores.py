"""How the exact pass scores a pair: by alignment, or by nearness."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ...config import LAWS

# From a per-head tensor `[H]` to a shape that meets the scores of the caller.
PerHead = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class DotProduct:
    """`score_ij = scaling q_i.k_j`, in nats."""

    scaling: float

    def __post_init__(self) -> None:
        number = isinstance(self.scaling, (int, float)) and not isinstance(self.scaling, bool)
        # A comparison, as a graph of any length cannot ask `math.isfinite` of a number of its own.
        if not number or not -math.inf < self.scaling < math.inf:
            raise ValueError(f"DotProduct.scaling: expected a finite number, got {self.scaling!r}")

    @property
    def metric(self) -> str:
        return "dot"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return ()

    def scores(
        self, product: Tensor, query_sq: Tensor | None, key_sq: Tensor | None, per_head: PerHead
    ) -> Tensor:
        return product * self.scaling


@dataclass(frozen=True, eq=False)
class Gravity:
    """The law of `gravity_hf.ops.api.gravity_attention`: `-M^2 ln(d^2 + eps)` ("power") or
    `M^2 / (d^2 + eps)` ("force").

    mass: `M` `[H]`. softening: `eps` `[H]`, in units of squared distance. key_radius_sq: `R^2`
    `[G]` for lifted keys, whose `d^2` is `|q|^2 + R^2 - 2 q.k`: what is near is then what is
    aligned.
    """

    mass: Tensor
    softening: Tensor
    law: str = "power"
    key_radius_sq: Tensor | None = None

    def __post_init__(self) -> None:
        if self.law not in LAWS:
            raise ValueError(f"Gravity.law: expected one of {list(LAWS)}, got {self.law!r}")
        if self.mass.dim() != 1 or self.softening.shape != self.mass.shape:
            got = f"{tuple(self.mass.shape)} and {tuple(self.softening.shape)}"
            raise ValueError(f"Gravity: expected mass and softening of one shape [H], got {got}")

    @property
    def metric(self) -> str:
        return "distance" if self.key_radius_sq is None else "dot"

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        radius = () if self.key_radius_sq is None else (self.key_radius_sq,)
        return (self.mass, self.softening, *radius)

    def scores(
        self, product: Tensor, query_sq: Tensor | None, key_sq: Tensor | None, per_head: PerHead
    ) -> Tensor:
        """`product` `q_i.k_j`; `query_sq`, `key_sq` squared lengths that broadcast with it."""
        mass, softening = (per_head(x.to(product.dtype)) for x in (self.mass, self.softening))
        if self.key_radius_sq is None:
            kappa = key_sq
        else:
            groups = self.mass.shape[0] // self.key_radius_sq.shape[0]
            kappa = per_head(self.key_radius_sq.to(product.dtype).repeat_interleave(groups))
        softened = (query_sq + kappa - 2.0 * product).clamp(min=0.0) + softening
        if self.law == "power":
            return -mass.square() * softened.log()
        return mass.square() / softened


Score = DotProduct | Gravity


def is_score(value: object) -> bool:
    return isinstance(value, (DotProduct, Gravity))


def squared_lengths(score: Score, x: Tensor) -> Tensor | None:
    """`|x|^2` `[..., T]` where the score asks for it."""
    return x.square().sum(-1) if isinstance(score, Gravity) else None
