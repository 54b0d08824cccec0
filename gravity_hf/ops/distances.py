"""A table of inverse distances between positions, made in blocks: no memory but the table's own.

Written with torch's operations the table and its gradient are some thirty passes over memory and
a dozen tables kept for the backward. Here a block of rows stays in the cache, and the backward
computes its distances again.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .blocks import ELEMENTS, ranges
from .curvature import Curvature
from .precision import exact_products
from .reference import compute_dtype
from .registry import no_second_gradient

# `|q|^2 + |k|^2 - 2 q.k` knows a squared distance to a few roundings of `|q|^2 + |k|^2`; below this
# many, what it says is noise, and the two positions count as one.
_ROUNDINGS = 8


def inverse_distances(
    queries: Tensor, keys: Tensor, *, eps: float, curvature: Curvature | None = None
) -> Tensor:
    """`1 / (d^2 + eps)`, or `1 / (D(d^2) + eps)` with a curvature: the `inverse_distance` of
    `gravity_attention`.

    `d^2` is exactly 0, gradient included, for equal positions and those that are nearer than the
    arithmetic can tell, `d^2 < 8 u (|q|^2 + |k|^2)` (u the dtype's rounding unit; both relative to
    the mean of the keys). First derivatives only. For a graph that is traced write the formula out:
    the number of blocks would be fixed in it.

    Args:
        queries: `[..., Tq, P]`.
        keys: `[..., Tk, P]`, leading dimensions as those of `queries`.
        eps: in units of squared distance; positive, or with a curvature not negative.

    Returns:
        `[..., Tq, Tk]`, float64 for float64 positions and float32 for all others.

    Raises:
        ValueError: shapes or an eps that do not fit.
    """
    lead, width = queries.shape[:-2], queries.shape[-1]
    if keys.shape[:-2] != lead or keys.shape[-1] != width:
        raise ValueError(
            "inverse_distances: expected queries [..., Tq, P] and keys [..., Tk, P] that agree in "
            f"all but T, got {tuple(queries.shape)} and {tuple(keys.shape)}: expand one of them"
        )
    if not (eps > 0 or (eps == 0 and curvature is not None)):
        raise ValueError(
            "inverse_distances: eps: expected a number > 0, or 0 with a curvature, whose horizon "
            f"keeps the distance positive, got {eps!r}"
        )
    dtype = compute_dtype(queries.dtype)
    queries, keys = (x.to(dtype).reshape(-1, *x.shape[-2:]) for x in (queries, keys))
    table = _Table.apply(queries, keys, float(eps), curvature)
    return table.view(*lead, *table.shape[-2:])


class _Table(torch.autograd.Function):
    """Of positions `[b, Tq, P]` and `[b, Tk, P]`."""

    @staticmethod
    def forward(queries: Tensor, keys: Tensor, eps: float, curvature: Curvature | None) -> Tensor:
        table = queries.new_empty(queries.shape[0], queries.shape[1], keys.shape[1])
        queries, keys = _centred(queries, keys)
        with exact_products(queries.device):
            for rows in _row_blocks(table):
                squared = _squared(queries[:, rows], keys)
                distance = squared if curvature is None else curvature.distance(squared)
                torch.reciprocal(distance.add_(eps), out=table[:, rows])
        return table

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor):
        ctx.save_for_backward(*inputs[:2], output)
        ctx.curvature = inputs[3]

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
        queries, keys, table = ctx.saved_tensors
        if torch.is_grad_enabled():
            no_second_gradient()
        # What depends on differences has no gradient by the point that they are measured from.
        queries, keys = _centred(queries, keys)
        to_queries, to_keys = torch.empty_like(queries), torch.zeros_like(keys)
        key_sums = keys.new_zeros(*keys.shape[:2], 1)
        with exact_products(grad.device):
            for rows in _row_blocks(table):
                block = queries[:, rows]
                squared = _squared(block, keys)
                turned = table[:, rows].square().mul_(grad[:, rows])
                if ctx.curvature is None:
                    turned.mul_(squared.gt_(0.0))
                else:
                    turned.mul_(ctx.curvature.slope(squared))
                # turned is -dL/d(d^2), and d(d^2)/dq = 2 (q - k).
                sums = turned.sum(-1, keepdim=True)
                to_queries[:, rows] = torch.bmm(turned, keys).sub_(block * sums).mul_(2.0)
                to_keys.baddbmm_(turned.mT, block)
                key_sums.add_(turned.sum(1).unsqueeze(-1))
        return to_queries, to_keys.sub_(keys * key_sums).mul_(2.0), None, None


def _centred(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    centre = keys.mean(-2, keepdim=True)
    return queries - centre, keys - centre


def _row_blocks(table: Tensor) -> Iterator[slice]:
    batch, queries, keys = table.shape
    budget = ELEMENTS["cpu" if table.device.type == "cpu" else "gpu"]
    return ranges(queries, max(1, budget // max(1, batch * keys)))


def _squared(queries: Tensor, keys: Tensor) -> Tensor:
    """`[b, rows, Tk]`."""
    lengths = queries.square().sum(-1).unsqueeze(-1) + keys.square().sum(-1).unsqueeze(-2)
    squared = torch.baddbmm(lengths, queries, keys.mT, alpha=-2.0)
    noise = lengths.mul_(_ROUNDINGS * torch.finfo(lengths.dtype).eps)
    # A mask in the dtype of the distances: on a CPU one of bools costs as much as two products.
    return squared.mul_(noise.lt_(squared))
