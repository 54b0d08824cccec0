"""How much a low-rank update changes what a map says to inputs that are not its own.

For inputs with second moment `C = E[x x^T]` an update `B A` of the map `W` leaks

    lambda = |B A C^(1/2)|_F / |W C^(1/2)|_F

which is the root mean square of what it adds to the map's outputs, over that of the outputs
themselves. Orthogonal subspaces do not bound it: inputs are not confined to the subspace that a
delta was trained to read.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .delta import LowRankDelta


@dataclass(frozen=True, eq=False)
class SecondMoment:
    """`C = E[x x^T]` of the inputs of one map, exactly: as rows where they are few, else densely.

    Args:
        kept: float32. Rows `[n, in]` with `C = rows^T rows` where n < in, or `C` `[in, in]` itself.
        tokens: how many inputs were seen.
        output_energy: `E|W x|^2` without the bias.
    """

    kept: Tensor
    tokens: int
    output_energy: float

    @property
    def is_dense(self) -> bool:
        """Whether `kept` is `C` itself."""
        return self.kept.shape[0] == self.kept.shape[1]

    def response(self, A: Tensor, B: Tensor) -> float:
        """`E|B A x|^2` of factors `A` `[r, in]`, `B` `[out, r]`; `B A` is never formed."""
        A, B, kept = (x.detach().cpu().double() for x in (A, B, self.kept))
        if self.is_dense:
            inner = A @ kept @ A.T
        else:
            inner = kept @ A.T
            inner = inner.T @ inner
        return max(float((inner * (B.T @ B)).sum()), 0.0)

    def leakage(self, A: Tensor, B: Tensor) -> float:
        """`lambda` of the update `B A`; infinite where the map itself says nothing at all."""
        response = self.response(A, B)
        if self.output_energy <= 0:
            return math.inf if response > 0 else 0.0
        return math.sqrt(response / self.output_energy)

    def matrix(self) -> Tensor:
        """`C` `[in, in]`, float64."""
        kept = self.kept.double()
        return kept if self.is_dense else kept.T @ kept

    def busy(self, quiet: float) -> Tensor:
        """Orthonormal directions `[in, k]`, float32, outside of which inputs have at most the share
        `quiet` of their energy: the eigenvectors of `C` with the largest eigenvalues.

        An update that is orthogonal to them lives in the null space of these inputs, as far as
        they have one.

        Args:
            quiet: in [0, 1).
        """
        if self.is_dense:
            energies, directions = torch.linalg.eigh(self.kept.double())
            energies, directions = energies.flip(0).clamp_min(0), directions.flip(1)
        else:
            _, values, rows = torch.linalg.svd(self.kept.double(), full_matrices=False)
            energies, directions = values.square(), rows.T
        total = float(energies.sum())
        if total <= 0:
            return torch.zeros(self.kept.shape[1], 0)
        # Those that are left out must not hold more than `quiet` together.
        left_out = total - energies.cumsum(0)
        held = int((left_out > quiet * total * (1 + 1e-12)).sum()) + 1
        # Directions that are nothing but rounding would take capacity for nothing.
        real = int((energies > 1e-12 * energies[0]).sum())
        return directions[:, : min(held, real)].float()


# Of every map: what its inputs are like.
Moments = Mapping[str, SecondMoment]


def delta_leakage(delta: LowRankDelta, moments: Moments) -> dict[str, float]:
    """`lambda` of a delta for every map that it changes and that has a moment."""
    return {
        name: moments[name].leakage(A, B)
        for name, (A, B) in delta.factors.items()
        if name in moments
    }
