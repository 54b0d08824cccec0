"""Gradients of one call.

Queries and keys each have a kernel that computes the weights again, so that nothing is added
atomically and every run gives the same bits.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .gradients import gather_inputs
from .key_gradients import key_gradients
from .problem import Problem
from .query_gradients import (
    BIAS,
    DISTANCE,
    RADIUS,
    SOFTENING,
    STRENGTH,
    query_gradients,
)
from .table_gradients import table_gradients


class Gradients(NamedTuple):
    """Of the tensors of a `Problem`; None where there is no tensor. All but the first three are
    float32."""

    q: Tensor | None
    k: Tensor | None
    v: Tensor
    strength: Tensor
    eps: Tensor | None
    key_radius_sq: Tensor | None
    query_mass: Tensor | None
    key_term: Tensor | None
    head_bias: Tensor | None
    radius: Tensor | None
    table: Tensor | None
    sink: Tensor | None


def backward(
    problem: Problem,
    out: Tensor,
    saved: Tensor,
    grad: Tensor,
    sums: int,
    norms: Tensor | None = None,
) -> Gradients:
    """Gradients of q, k, v, key_term and sink (`sums` 0), of all but eps and key_radius_sq (1), or
    of everything (2). `saved`, and `norms` where they are still there: see `forward.forward`.
    """
    inputs = gather_inputs(problem, saved, grad, norms)
    # First: it fills `inputs.delta`.
    by_query = query_gradients(problem, out, inputs, sums)
    grad_k, grad_v, grad_key_term = key_gradients(problem, inputs)
    grad_table = (
        table_gradients(problem, inputs) if problem.table is not None and sums > 0 else None
    )
    if sums == 0:
        grads = {"q": by_query.q, "k": grad_k, "v": grad_v, "key_term": grad_key_term}
        return Gradients(**{**dict.fromkeys(Gradients._fields), **grads, "sink": by_query.sink})

    # One kernel for all planes; those that nobody wrote are not read below.
    totals = by_query.sums.sum((1, 3))

    def per_head(plane: int) -> Tensor:
        return totals[plane]

    grad_radius = grad_radius_sq = grad_eps = None
    if problem.eps is not None and sums == 2:
        grad_eps = per_head(SOFTENING.value)
    if problem.radius is not None:
        grad_radius = per_head(RADIUS.value) * 2.0 * problem.radius
    if problem.key_radius_sq is not None and sums == 2:
        grad_radius_sq = per_head(DISTANCE.value).unflatten(0, (problem.kv_heads, -1)).sum(1)
    return Gradients(
        q=by_query.q,
        k=grad_k,
        v=grad_v,
        strength=per_head(STRENGTH.value),
        eps=grad_eps,
        key_radius_sq=grad_radius_sq,
        query_mass=by_query.query_mass,
        key_term=grad_key_term,
        head_bias=None if problem.head_bias is None else per_head(BIAS.value),
        radius=grad_radius,
        table=grad_table,
        sink=by_query.sink,
    )
