"""Exact algebra of products `B A` of thin factors, never formed densely.

All of it goes through QR decompositions of the factors and a small core between them, in float64:
`[out, in]` is never in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]

# Singular values below this share of the largest are what rounding left.
NEGLIGIBLE = 1e-7


class Decomposition(NamedTuple):
    """The thin SVD of `B A`: `left [out, k]`, `values [k]` descending, `right [k, in]`, float64,
    on the device of the factors. `k` is at most the rank of the factors, and may be 0."""

    left: Tensor
    values: Tensor
    right: Tensor

    def pair(self, rank: int | None = None) -> Pair:
        """Factors `(A [k, in], B [out, k])` of the best approximation of that rank, float32, with
        the root of each singular value in both: rows of A are as long as columns of B.

        Of rank 0 it is one row and one column of zeros, as factors have no rank 0.
        """
        rank = len(self.values) if rank is None else min(rank, len(self.values))
        if rank == 0:
            zeros = self.right.new_zeros
            width_in, width_out = self.right.shape[1], self.left.shape[0]
            return zeros(1, width_in).float(), zeros(width_out, 1).float()
        root = self.values[:rank].sqrt()
        return (root[:, None] * self.right[:rank]).float(), (self.left[:, :rank] * root).float()

    def energy_rank(self, energy: float) -> int:
        """The smallest rank that keeps that share of the squared Frobenius norm."""
        squares = self.values.square()
        total = squares.sum()
        if total == 0:
            return 0
        # Rounding of the sum must not ask for one rank more.
        enough = squares.cumsum(0) >= energy * total * (1 - 1e-12)
        return int(enough.double().argmax()) + 1


@torch.no_grad()
def decomposed(A: Tensor, B: Tensor) -> Decomposition:
    """The SVD of `B A`, by QR of both factors and SVD of the core `R_B R_A^T` `[r, r]`.

    Args:
        A: `[r, in]`, B: `[out, r]`, any float dtype. `r` may exceed `in` and `out`.
    """
    q_in, r_in = torch.linalg.qr(A.double().T)
    q_out, r_out = torch.linalg.qr(B.double())
    left, values, right = torch.linalg.svd(r_out @ r_in.T, full_matrices=False)
    kept = int((values > NEGLIGIBLE * values[0]).sum()) if len(values) else 0
    return Decomposition(q_out @ left[:, :kept], values[:kept], right[:kept] @ q_in.T)


def summed(pairs: Sequence[Pair]) -> Pair:
    """Factors of the sum of all `B A`: concatenated, so that the ranks add up."""
    return torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], 1)


@torch.no_grad()
def frobenius(A: Tensor, B: Tensor) -> float:
    """`||B A||_F`, without the cancellation that traces of Gram matrices suffer from."""
    r_in = torch.linalg.qr(A.double().T, mode="r").R
    r_out = torch.linalg.qr(B.double(), mode="r").R
    return float((r_out @ r_in.T).norm())


def relative_error(exact: Pair, approximate: Pair) -> float:
    """`||B A - B' A'||_F / ||B A||_F`. For an update of zero: 0 if both are, else infinite."""
    A, B = summed([exact, (approximate[0], -approximate[1])])
    error, norm = frobenius(A, B), frobenius(*exact)
    if norm == 0:
        return 0.0 if error == 0 else float("inf")
    return error / norm
