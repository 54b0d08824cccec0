"""The gradient of `routed.py`: the same tiles and strips once more, with their weights computed
again. What a query gets from its tiles is gathered as in the forward pass; nothing is scattered but
the sums of whole blocks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..precision import exact_products
from .laws import Vectors
from .routed import (
    Group,
    Plan,
    hide_,
    strip_products,
    strip_rows,
    take,
    tile_products,
)
from .routing import TILE

Gradients = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor]


class _Rows(NamedTuple):
    """Of queries and one more that is nobody: the gradient of the output `[Tq + 1, g, Dv]`, its
    product with the output and the logarithm of the sum of weights `[Tq + 1, g, 1]`."""

    grad: Tensor
    shift: Tensor
    log_sum: Tensor


def backward(
    vectors: Vectors, v: Tensor, plan: Plan, output: Tensor, log_sums: Tensor, grad: Tensor
) -> Gradients:
    """Of the fields of `vectors` and v."""
    grad_q, grad_k, grad_v = (torch.zeros_like(x) for x in (vectors.q, vectors.k, v))
    grad_strength = None if vectors.strength is None else torch.zeros_like(vectors.strength)
    groups = vectors.q.shape[1] // v.shape[1]
    with exact_products(v.device):
        for row in range(v.shape[0]):
            for head in range(v.shape[1]):
                heads = slice(head * groups, (head + 1) * groups)
                parts = (grad[row, heads], output[row, heads], log_sums[row, heads])
                found = _Head(plan.group(vectors, v, row, head), _rows(*parts), plan, row, head)
                grad_q[row, heads] = found.queries.transpose(0, 1)
                grad_k[row, head], grad_v[row, head] = found.keys, found.values
                if grad_strength is not None:
                    grad_strength[heads] += found.strength
    return grad_q, grad_k, grad_strength, None, grad_v


def _rows(grad: Tensor, output: Tensor, log_sum: Tensor) -> _Rows:
    shift = (grad * output).sum(-1, keepdim=True)
    tensors = (x.transpose(0, 1) for x in (grad, shift, log_sum.unsqueeze(-1)))
    grad, shift, log_sum = (F.pad(x, (0, 0, 0, 0, 0, 1)) for x in tensors)
    # Weights of whoever is nobody are 0.
    log_sum[-1] = float("inf")
    return _Rows(grad.contiguous(), shift, log_sum)


class _Head:
    """The gradients of one batch row and key-value head, summed up while it is made."""

    def __init__(self, group: Group, rows: _Rows, plan: Plan, row: int, head: int) -> None:
        self.group, self.given = group, rows
        self.keys, self.values = (torch.zeros_like(x) for x in (group.keys, group.values))
        self.strength: Tensor | float = 0.0
        self._tiles(plan, row, head)
        self._strips(plan, row)

    def _tiles(self, plan: Plan, row: int, head: int) -> None:
        group, tiles = self.group, plan.tiles(row, head)
        groups, width = group.queries.shape[1:]
        size, places = group.key_blocks.shape[1], tiles.queries.numel()
        queries = group.queries.new_zeros(places + 1, groups, width)
        keys, values = (torch.zeros_like(x) for x in (group.key_blocks, group.value_blocks))
        for batch in plan.batches(tiles, row, 2 * groups * (2 * width + size)):
            products = tile_products(group, batch)
            scores = group.law.scores_(products.clone())
            hide_(scores, batch)
            rows = (take(x, batch.queries).unflatten(0, (-1, TILE)) for x in self.given)
            grad, value = self._of_products(
                products, scores, rows, take(group.value_blocks, batch.block)
            )
            of_queries = take(group.queries, batch.queries).view(-1, TILE * groups, width)
            key = grad.mT @ of_queries
            part = grad @ take(group.key_blocks, batch.block)
            queries[batch.where] = part.view(-1, groups, width)
            keys.index_add_(0, batch.block, key)
            values.index_add_(0, batch.block, value)
        self.queries = F.embedding_bag(tiles.places, queries.flatten(1), mode="sum")
        self.queries = self.queries.unflatten(1, (groups, width))
        first, count = plan.first_key(row), self.keys.shape[0]
        self.keys[first:] += keys.flatten(0, 1)[: count - first]
        self.values[first:] += values.flatten(0, 1)[: count - first]

    def _strips(self, plan: Plan, row: int) -> None:
        group, local = self.group, plan.strips[row]
        products = strip_products(group, local)
        scores = group.law.scores_(products.clone()).add_(local.bias.unsqueeze(2))
        log_sum = strip_rows(self.given.log_sum[:-1], local)
        rows = [strip_rows(x[:-1], local) for x in self.given[:2]]
        grad, value = self._of_products(
            products, scores, (*rows, log_sum), group.values[local.keys]
        )
        queries = strip_rows(group.queries[:-1], local).flatten(1, 2)
        where = local.keys.flatten()
        self.keys.index_add_(0, where, (grad.mT @ queries).flatten(0, 1))
        self.values.index_add_(0, where, value.flatten(0, 1))
        part = (grad @ group.keys[local.keys]).view(-1, *group.queries.shape[1:])
        self.queries = self.queries + part[: self.queries.shape[0]]

    def _of_products(
        self, products: Tensor, scores: Tensor, rows: object, values: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The gradients of products, `[n, rows * g, keys]`, and of values `[n, keys, Dv]`."""
        grad, shift, log_sum = rows
        weights = scores.sub_(log_sum).exp_()
        grad = grad.flatten(1, 2)
        of_values = weights.flatten(1, 2).mT @ grad
        of_scores = (grad @ values.mT).view(weights.shape).sub_(shift).mul_(weights)
        of_products, strength = self.group.law.gradients(products, of_scores)
        if strength is not None:
            self.strength = self.strength + strength
        return of_products.flatten(1, 2), of_values
