"""Vectors centred and scaled, so that the cosine between them says something."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import ValidationError


class Whitening:
    """Centres vectors and scales their directions to equal spread, with shrinkage.

    With mean `m` and covariance `S` of a pool of vectors: `x -> C^(-1/2) (x - m)`, with
    `C = (1 - shrinkage) S + shrinkage tr(S)/d I`; of unit length afterwards. A shrinkage of 1 only
    centres. (J. Su et al., 2021, whiten sentence vectors this way; the shrinkage, as in Ledoit and
    Wolf, 2004, keeps it defined for fewer vectors than dimensions.) Float64 inside.

    Args:
        pool: `[n, d]`, finite.
        shrinkage: more than 0, at most 1.

    Raises:
        ValidationError: something else.
    """

    def __init__(self, pool: Tensor, shrinkage: float = 0.1) -> None:
        if pool.ndim != 2 or len(pool) == 0 or not pool.isfinite().all():
            raise ValidationError(
                f"Whitening: expected finite vectors [n, d], got {list(pool.shape)}"
            )
        if not 0 < shrinkage <= 1:
            raise ValidationError(
                f"Whitening.shrinkage: expected more than 0 and at most 1, got {shrinkage!r}"
            )
        pool = pool.double()
        self.mean = pool.mean(0)
        _, spread, self._directions = torch.linalg.svd(pool - self.mean, full_matrices=False)
        variance = spread.square() / len(pool)
        floor = shrinkage * variance.sum() / pool.shape[1]
        # Of equal vectors the spread is 0: then only the length is left to scale.
        total = ((1 - shrinkage) * variance + floor).clamp_min(torch.finfo(torch.float64).tiny)
        # Relative to directions outside the pool's span, whose variance is the floor.
        self._scales = (floor.clamp_min(torch.finfo(torch.float64).tiny) / total).sqrt()

    def __call__(self, vectors: Tensor) -> Tensor:
        """`[n, d]` -> `[n, d]`, float64, rows of length 1; a vector at the mean gives zeros."""
        centred = vectors.double() - self.mean
        along = centred @ self._directions.T
        # Up to one common factor, which the length of 1 takes away.
        scaled = centred + (along * (self._scales - 1)) @ self._directions
        length = torch.linalg.vector_norm(scaled, dim=-1, keepdim=True)
        return torch.where(length > 0, scaled / length.clamp_min(1e-300), 0.0)
