"""The directions that low-rank updates read and write, and the angles between them.

An update `B A` of a linear map `[out, in]` reads its input through a subspace of `R^in` (the row
space of `B A`) and writes into a subspace of `R^out` (its column space). Two updates whose input
subspaces are orthogonal do not answer to each other's directions. Arithmetic is float64, what is
kept is float32.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .low_rank import decomposed

# A unit column whose part outside the basis is shorter than this adds nothing to the basis.
DROPPED = 1e-6


class Spans(NamedTuple):
    """Orthonormal columns, float32: `input` `[in, k]`, `output` `[out, k]`; `k` is the rank of the
    update, which may be less than that of its factors."""

    input: Tensor
    output: Tensor


def update_spans(A: Tensor, B: Tensor) -> Spans:
    """The subspaces that `B A` reads and writes, by its SVD.

    Rows of `A` that `B` ignores occupy nothing: an update of zero has spans of no columns.

    Args:
        A: `[r, in]`. B: `[out, r]`.

    Raises:
        ValueError: the factors do not fit each other, or are not finite.
    """
    if A.dim() != 2 or B.dim() != 2 or A.shape[0] != B.shape[1]:
        raise ValueError(
            f"update_spans: expected A [r, in] and B [out, r], got {tuple(A.shape)} and "
            f"{tuple(B.shape)}. Check the order of the factors"
        )
    _require_finite("update_spans", A, B)
    found = decomposed(A.detach().cpu(), B.detach().cpu())
    return Spans(found.right.T.float(), found.left.float())


def principal_angles(first: Tensor, second: Tensor) -> Tensor:
    """Angles between two subspaces, radians, ascending, `[min(ka, kb)]` float64.

    Small angles come from the sine and large ones from the cosine, each of which is exact where
    the other loses half of its digits (Björck and Golub 1973; Knyazev and Argentati 2002).

    Args:
        first: `[dim, ka]`, second: `[dim, kb]`: any columns that span the subspaces.

    Raises:
        ValueError: columns of different lengths, or numbers that are not finite.
    """
    if first.dim() != 2 or second.dim() != 2 or first.shape[0] != second.shape[0]:
        raise ValueError(
            f"principal_angles: expected two matrices of columns of one length, got "
            f"{tuple(first.shape)} and {tuple(second.shape)}. Compare deltas of the same module"
        )
    _require_finite("principal_angles", first, second)
    return _angles(orthonormal(first), orthonormal(second))


def angle_score(first: Tensor, second: Tensor) -> float:
    """The smallest principal angle over pi / 2: 0 where the subspaces share a direction, 1 where
    they are orthogonal or one of them is empty. Arguments as for `principal_angles`."""
    return _score(principal_angles(first, second))


def orthonormal_score(first: Tensor, second: Tensor) -> float:
    """As `angle_score`, of columns that are orthonormal already."""
    return _score(_angles(first, second))


def _score(angles: Tensor) -> float:
    return float(angles.min() / (math.pi / 2)) if angles.numel() else 1.0


def _angles(first: Tensor, second: Tensor) -> Tensor:
    a, b = first.double(), second.double()
    if a.shape[1] < b.shape[1]:
        a, b = b, a
    if not b.shape[1]:
        return torch.zeros(0, dtype=torch.float64)
    overlap = a.T @ b
    cosines = torch.linalg.svdvals(overlap).clamp(0, 1)
    sines = torch.linalg.svdvals(b - a @ overlap).clamp(0, 1).flip(0)
    return torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())


def orthonormal(columns: Tensor, *, tolerance: float = DROPPED) -> Tensor:
    """Orthonormal columns `[dim, k]` with the span of `columns` `[dim, n]`, float32, in order."""
    return Basis(columns.shape[0], tolerance=tolerance).extended(columns).columns


class Basis:
    """An orthonormal basis `[dim, rank]` that grows by columns; never changed, only extended.

    Args:
        dim: length of its vectors.
        columns: `[dim, rank]`, orthonormal already; None: the empty basis.
        tolerance: part of a unit column outside the basis below which the column is dropped.
    """

    def __init__(
        self, dim: int, columns: Tensor | None = None, *, tolerance: float = DROPPED
    ) -> None:
        self.dim = dim
        self.columns = torch.zeros(dim, 0) if columns is None else columns
        self.tolerance = tolerance

    @property
    def rank(self) -> int:
        """How many directions are taken."""
        return int(self.columns.shape[1])

    @property
    def free(self) -> int:
        """How many directions are left."""
        return self.dim - self.rank

    def extended(self, columns: Tensor) -> Basis:
        """The basis and what `columns` `[dim, n]` add to it, by two passes of Gram-Schmidt.

        The second pass removes what rounding left of the first ("twice is enough", Parlett 1980).
        Columns count by direction, so that small factors are not mistaken for none.

        Raises:
            ValueError: columns of another length, or not finite.
        """
        if columns.dim() != 2 or columns.shape[0] != self.dim:
            raise ValueError(
                f"Basis: expected columns [{self.dim}, n], got {tuple(columns.shape)}. Transpose "
                "rows, or compare with the basis of the same module"
            )
        _require_finite("Basis", columns)
        taken = self.columns.double().to(columns.device)
        rest = _outside(_outside(_unit(columns.double()), taken), taken)
        added = _orthonormal_in_order(rest, self.tolerance)
        # Short rests had their rounding enlarged when they were made unit columns.
        added = _unit(_outside(added, taken))
        if not added.shape[1]:
            return self
        grown = torch.cat([taken, added], 1).float().cpu()
        return Basis(self.dim, grown, tolerance=self.tolerance)

    def without(self, rows: Tensor) -> Tensor:
        """`rows` `[n, dim]` less their parts inside the basis, in their dtype: `A (I - Q Q^T)`."""
        taken = self.columns.to(rows.device).double()
        return _outside(rows.double().T, taken).T.to(rows.dtype)


def joined(bases: Sequence[Tensor | None]) -> Tensor | None:
    """Orthonormal columns that span all of `bases`, each `[dim, k]` or None; None if nothing."""
    given = [columns for columns in bases if columns is not None and columns.shape[1]]
    if len(given) < 2:
        return given[0] if given else None
    # The first is orthonormal already: only what the others add is worked out.
    basis = Basis(given[0].shape[0], given[0])
    return basis.extended(torch.cat(given[1:], 1)).columns


def _orthonormal_in_order(columns: Tensor, tolerance: float) -> Tensor:
    """Each column's part outside those before it, as a unit column; shorter ones are dropped."""
    found = torch.empty_like(columns)
    count = 0
    for column in columns.unbind(1):
        own = found[:, :count]
        rest = _outside(_outside(column[:, None], own), own)
        length = rest.norm()
        if length >= tolerance:
            found[:, count] = _outside(rest / length, own)[:, 0]
            found[:, count] /= found[:, count].norm()
            count += 1
    return found[:, :count]


def _outside(columns: Tensor, taken: Tensor) -> Tensor:
    return columns - taken @ (taken.T @ columns) if taken.shape[1] else columns


def _unit(columns: Tensor) -> Tensor:
    norms = columns.norm(dim=0, keepdim=True)
    return columns / norms.clamp_min(torch.finfo(columns.dtype).tiny)


def _require_finite(what: str, *tensors: Tensor) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise ValueError(
            f"{what}: expected finite numbers, got NaN or infinity. The delta did not train; "
            "lower its learning rate"
        )
