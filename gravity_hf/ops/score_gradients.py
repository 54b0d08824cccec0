"""The derivatives of the scores of one block. Formulas: README.md."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import Block
from .problem import Problem
from .scores import Scores, soft_factor


def differentiate_scores(
    problem: Problem,
    block: Block,
    scores: Scores,
    grad: Tensor,
    grads: dict[str, Tensor],
) -> Tensor | None:
    """From dL/dscore to the distances; `grad` and what `scores` holds are overwritten.

    `grads` holds the gradients so far, by field of `Problem`, those of `strength` and `offset` in
    full, `[B, H, Tq]`; all but q, k, v and mask get the block's part here.

    Returns:
        A factor `[b|1, n, G, rows|1, 1]` that is left to apply to `grad`, of the row and so cheaper
        to apply to the narrow sides of products: `grad * factor` is dL/d(q'k'). None: nothing is
        left to apply.
    """
    outward = _through_cutoff(problem, block, scores, grad, grads)
    if scores.capped is not None:
        _through_cap(problem, scores.capped, grad)
    strength = problem.rows_of(problem.strength, block).unsqueeze(-1)
    if problem.law == "power":
        _through_power(problem, block, scores, grad, grads)
    else:
        _through_force(problem, block, scores, strength, grad, grads)
    if problem.table is not None:
        return None
    turn = -strength
    if problem.curvature is not None:
        _add_per_head(grads["eps"], block, problem, grad.sum(-1, keepdim=True).mul_(turn))
        grad.mul_(problem.curvature.slope(scores.distance_sq))
        return turn
    if outward is not None:
        _add_per_head(grads["eps"], block, problem, grad.sum(-1, keepdim=True).mul_(turn))
        grad.mul_(turn).add_(outward)
        turn = None
    elif scores.unclamped is not None:
        # Where nothing is clamped, eps has its gradient from the product.
        rows = grad.sum(-1, keepdim=True)
        grad.mul_(scores.unclamped)
        rows.sub_(grad.sum(-1, keepdim=True))
        _add_per_head(grads["eps"], block, problem, rows.mul_(turn))
        return turn
    if scores.unclamped is not None:
        grad.mul_(scores.unclamped)
    return turn


def _through_cap(problem: Problem, capped: Tensor, grad: Tensor) -> None:
    if problem.smooth_cap:
        grad.mul_(capped.square_().neg_().add_(1.0))
    else:
        grad.masked_fill_(capped, 0.0)


def _through_cutoff(
    problem: Problem,
    block: Block,
    scores: Scores,
    grad: Tensor,
    grads: dict[str, Tensor],
) -> Tensor | None:
    """`grad` from dL/dscore to before the cutoff, in place. Returns dL/d(d^2) by the cutoff."""
    if problem.cutoff is None:
        return None
    distance_sq = scores.distance_sq
    radius_sq = problem.heads_of(problem.radius_sq, block)
    if problem.cutoff == "soft":
        factor = soft_factor(problem, block, distance_sq)
        slope = (grad * scores.uncut).mul_(factor > 0.0).div_(radius_sq)
        _add_per_head(grads["radius_sq"], block, problem, (slope * distance_sq).div_(radius_sq))
        grad.mul_(factor)
    else:
        # The derivative of logsigmoid(x) is sigmoid(-x).
        slope = torch.sub(distance_sq, radius_sq, out=scores.weights)
        if problem.cutoff_width != 1.0:
            slope.div_(problem.cutoff_width)
        slope.sigmoid_().mul_(grad)
        if problem.cutoff_width != 1.0:
            slope.div_(problem.cutoff_width)
        _add_per_head(grads["radius_sq"], block, problem, slope)
    return slope.neg_()


def _through_power(
    problem: Problem, block: Block, scores: Scores, grad: Tensor, grads: dict[str, Tensor]
) -> None:
    """score = -strength ln(softened) + key; `grad` becomes dL/d(softened) over -strength.

    A table is one over the softened distance; its gradient is added here.
    """
    softened, spare = scores.softened, scores.weights
    if problem.softcap is not None:
        torch.log(softened, out=spare)
    else:
        spare = scores.logarithm
    problem.rows_of(grads["strength"], block).copy_(spare.mul_(grad).sum(-1).neg_())
    if problem.key_term is not None:
        problem.add_to_columns(grads["key_term"], block, grad.sum(3, keepdim=True))
    if softened is None:
        grad.mul_(problem.rows_of(problem.strength, block).unsqueeze(-1))
        _add_to_table(problem, block, grad.div_(problem.table_of(problem.table, block)), grads)
        return
    grad.div_(softened)


def _through_force(
    problem: Problem,
    block: Block,
    scores: Scores,
    strength: Tensor,
    grad: Tensor,
    grads: dict[str, Tensor],
) -> None:
    """score = (strength / softened + offset) key; `grad` becomes dL/d(softened) over -strength.

    With a table, strength times table takes the place of the quotient.
    """
    softened, table = scores.softened, None
    if softened is None:
        table = problem.table_of(problem.table, block)
    offset, key = problem.offset, None
    if problem.key_term is not None:
        key = problem.key_columns(problem.key_term, block)
    if offset is not None:
        offset = problem.rows_of(offset, block)
        problem.rows_of(grads["offset"], block).copy_(_along_keys(grad, key))
        if key is not None:
            problem.add_to_columns(grads["key_term"], block, _along_rows(grad, offset))
    if table is not None:
        spare = torch.mul(grad, strength, out=scores.weights)
        _add_to_table(problem, block, spare if key is None else spare.mul_(key), grads)
        grad.mul_(table)
    else:
        grad.div_(softened)
    problem.rows_of(grads["strength"], block).copy_(_along_keys(grad, key))
    if key is not None:
        part = _along_rows(grad, strength.squeeze(-1))
        problem.add_to_columns(grads["key_term"], block, part)
    if table is None:
        if key is not None:
            grad.mul_(key)
        grad.div_(softened)


def _along_keys(grad: Tensor, key: Tensor | None) -> Tensor:
    """`sum_j grad_ij key_j`: `[b, n, G, rows]`; `key` `[b, n, G, 1, keys]`, ones if None."""
    if key is None:
        return grad.sum(-1)
    return torch.bmm(grad.flatten(0, 2), key.flatten(0, 2).mT).view(grad.shape[:-1])


def _along_rows(grad: Tensor, row: Tensor) -> Tensor:
    """`sum_i row_i grad_ij`: `[b, n, G, 1, keys]`; `row` `[b|1, n, G, rows|1]`."""
    row = row.expand(grad.shape[:-1]).flatten(0, 2).unsqueeze(1)
    return torch.bmm(row, grad.flatten(0, 2)).view(*grad.shape[:3], 1, -1)


def _add_to_table(problem: Problem, block: Block, part: Tensor, grads: dict[str, Tensor]) -> None:
    total = problem.table_of(grads["table"], block)
    total.add_(part.sum_to_size(total.shape))


def _add_per_head(total: Tensor, block: Block, problem: Problem, part: Tensor) -> None:
    total.view(problem.sizes[1:3])[block.heads] += part.sum((0, 3, 4))
