"""Scores and their derivatives from products of vectors that carry what a law needs.

For a dot product the queries carry its scaling; for gravity a product of augmented vectors is the
softened squared distance (`gravity_hf.ops.chunked.augment`), which is clamped at the softening.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..chunked import augment
from .scores import Gravity, Score


class Vectors(NamedTuple):
    """q `[B, H, Tq, E]`, k `[B, G, Tk, E]`; strength `M^2` and softening `[H]`, None for a dot
    product. All of one dtype."""

    q: Tensor
    k: Tensor
    strength: Tensor | None
    softening: Tensor | None


def vectors_of(q: Tensor, k: Tensor, score: Score, dtype: torch.dtype) -> Vectors:
    q, k = q.to(dtype), k.to(dtype)
    if not isinstance(score, Gravity):
        return Vectors(q * score.scaling, k, None, None)
    mass, softening = score.mass.to(dtype), score.softening.to(dtype)
    radius = None if score.key_radius_sq is None else score.key_radius_sq.to(dtype)
    q, k = augment(q, k, softening, radius)
    return Vectors(q, k, mass.square(), softening)


class Law(NamedTuple):
    """Of the heads of one group: kind "dot", "power" or "force"; strength, softening `[g, 1]`."""

    kind: str
    strength: Tensor | None
    softening: Tensor | None

    def scores_(self, products: Tensor) -> Tensor:
        """`[..., g, keys]`, in place."""
        if self.kind == "dot":
            return products
        torch.maximum(products, self.softening, out=products)
        if self.kind == "power":
            return products.log_().mul_(-self.strength)
        return products.reciprocal_().mul_(self.strength)

    def gradients(self, products: Tensor, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        """Of products and strength `[g]`, from `grad` of the scores; both may be overwritten."""
        if self.kind == "dot":
            return grad, None
        softened = torch.maximum(products, self.softening)
        clamped = products < self.softening
        if self.kind == "power":
            base = softened.log().neg_()
            slope = softened.reciprocal_().mul_(-self.strength)
        else:
            base = softened.reciprocal_()
            slope = base.square().mul_(-self.strength)
        over = [*range(grad.dim() - 2), grad.dim() - 1]
        strength = (grad * base).sum(over)
        return grad.mul_(slope).masked_fill_(clamped, 0.0), strength


def law_of(kind: str, vectors: Vectors, heads: slice) -> Law:
    """heads: those of a group."""
    if vectors.strength is None:
        return Law("dot", None, None)
    strength, softening = (x.detach()[heads, None] for x in vectors[2:])
    return Law(kind, strength, softening)
