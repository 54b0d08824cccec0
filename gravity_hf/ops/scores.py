"""The scores of one block, and their derivatives. Formulas: README.md.

Every term is applied in place, and one that a call leaves out costs nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import INFINITY, Block
from .problem import Problem
from .reference import SELF_SCORE
from .sinks import softmax_beside_sink
from .softcap import capped_scores


@dataclass(frozen=True)
class Scores:
    """A block's weights `[b, n, G, rows, keys]` after the softmax, and what its derivative needs.

    softened: `d^2 + eps`, with `d^2` clamped, or `D + eps`. clamped: where `d^2` was negative.
    distance_sq: `d^2`. capped: where the score exceeded `max_force`, or the `tanh` of a smooth one.
    bend: the `tanh` of a soft cap. uncut: scores before a soft cutoff. dead: `[..., rows, 1]`, rows
    that see nothing; their weights are finite and mean nothing. sink_weight: of the sink,
    `[..., rows, 1]`. What is not needed is None.
    """

    weights: Tensor
    softened: Tensor | None = None
    clamped: Tensor | None = None
    distance_sq: Tensor | None = None
    capped: Tensor | None = None
    uncut: Tensor | None = None
    dead: Tensor | None = None
    bend: Tensor | None = None
    sink_weight: Tensor | None = None


def block_scores(problem: Problem, block: Block, *, differentiable: bool) -> Scores:
    """Where nothing will be differentiated, the weights overwrite the distances."""
    softened = clamped = distance_sq = capped = uncut = bend = sink_weight = None
    if problem.table is None:
        softened = problem.product(block)
        eps, curvature = problem.heads_of(problem.eps, block), problem.curvature
        with_eps = problem.cutoff is None and curvature is None
        floor = eps if with_eps else torch.zeros_like(eps)
        # Under a curvature the slope of what will be clamped is 0.
        clamped = _below(softened, floor) if differentiable and curvature is None else None
        torch.maximum(softened, floor, out=softened)
        if not with_eps:
            distance_sq = softened
            softened = (distance_sq if curvature is None else curvature.distance(distance_sq)) + eps
        score = torch.empty_like(softened) if differentiable else softened
    else:
        score = problem.v.new_empty(_shape(problem, block))
    if problem.softcap is None:
        _apply_law(problem, block, softened, score)
    else:
        bend = capped_scores(problem, block, softened, score)
    if problem.max_force is not None:
        capped = _cap(problem, score, differentiable)
    if problem.cutoff == "soft":
        uncut = score.clone() if differentiable else None
        score.mul_(_soft_factor(problem, block, distance_sq))
    elif problem.cutoff == "log":
        score.add_(torch.nn.functional.logsigmoid(_inside(problem, block, distance_sq)))
    dead = _hide(problem, block, score, distance_sq)
    if problem.sink is None:
        weights = torch.softmax(score, -1, out=score)
    else:
        weights, sink_weight = score, softmax_beside_sink(problem, block, score)
    return Scores(weights, softened, clamped, distance_sq, capped, uncut, dead, bend, sink_weight)


def differentiate_scores(
    problem: Problem, block: Block, scores: Scores, grad: Tensor, grads: dict[str, Tensor]
) -> Tensor | None:
    """From dL/dscore to the distances; `grad` and the weights in `scores` are overwritten.

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
    turn, clamped = -strength, scores.clamped
    if problem.curvature is not None:
        _add_per_head(grads["eps"], block, problem, grad * turn)
        grad.mul_(problem.curvature.slope(scores.distance_sq))
        return turn
    if outward is None:
        # Where nothing is clamped, eps has its gradient from the product.
        if clamped is not None:
            _add_per_head(grads["eps"], block, problem, torch.where(clamped, grad * turn, 0.0))
            grad.masked_fill_(clamped, 0.0)
        return turn
    grad.mul_(turn)
    _add_per_head(grads["eps"], block, problem, grad)
    grad.add_(outward)
    if clamped is not None:
        grad.masked_fill_(clamped, 0.0)
    return None


def _shape(problem: Problem, block: Block) -> tuple[int, ...]:
    parts = (block.batch, block.heads, block.rows, block.window.keys)
    batch, heads, rows, keys = (part.stop - part.start for part in parts)
    return batch, heads, problem.sizes.groups, rows, keys


def _apply_law(problem: Problem, block: Block, softened: Tensor | None, out: Tensor) -> None:
    """The score into `out`, which may be `softened`."""
    strength = problem.rows_of(problem.strength, block).unsqueeze(-1)
    key = None if problem.key_term is None else problem.key_columns(problem.key_term, block)
    if problem.law == "power":
        _logarithm(problem, block, softened, out).mul_(-strength)
        if key is not None:
            out.add_(key)
        return
    _unweighted(problem, block, softened, strength, out)
    if key is not None:
        out.mul_(key)


def _unweighted(
    problem: Problem, block: Block, softened: Tensor | None, strength: Tensor, out: Tensor
) -> None:
    """The force before the key's mass, `strength / n + offset`, into `out`."""
    if softened is None:
        torch.mul(strength, problem.table_of(problem.table, block).expand_as(out), out=out)
    else:
        torch.div(strength, softened, out=out)
    if problem.offset is not None:
        out.add_(problem.rows_of(problem.offset, block).unsqueeze(-1))


def _logarithm(problem: Problem, block: Block, softened: Tensor | None, out: Tensor) -> Tensor:
    """Of the softened distance into `out`, which may be `softened`."""
    if softened is not None:
        return torch.log(softened, out=out)
    table = problem.table_of(problem.table, block)
    return out.copy_(table.log().neg_().expand_as(out))


def _cap(problem: Problem, score: Tensor, differentiable: bool) -> Tensor | None:
    """The ceiling, in place. Returns what `_through_cap` needs."""
    limit = problem.max_force
    if problem.smooth_cap:
        bend = score.div_(limit).tanh_()
        bend = bend.clone() if differentiable else None
        score.mul_(limit)
        return bend
    capped = score > limit if differentiable else None
    score.clamp_(max=limit)
    return capped


def _through_cap(problem: Problem, capped: Tensor, grad: Tensor) -> None:
    if problem.smooth_cap:
        grad.mul_(capped.square_().neg_().add_(1.0))
    else:
        grad.masked_fill_(capped, 0.0)


def _hide(
    problem: Problem, block: Block, score: Tensor, distance_sq: Tensor | None
) -> Tensor | None:
    """-inf for hidden pairs, after what `exclude_self` replaces. Returns the dead rows."""
    window = block.window
    if problem.exclude_self:
        problem.own_pairs(score, block).fill_(SELF_SCORE)
    if problem.cutoff == "hard":
        score.masked_fill_(distance_sq > problem.heads_of(problem.radius_sq, block), -INFINITY)
    if window.bias is not None:
        score[..., window.bias_keys].add_(window.bias)
    if problem.cutoff != "hard":
        return window.dead
    dead = score.amax(-1, keepdim=True) == -INFINITY
    score.masked_fill_(dead, 0.0)
    return dead if window.dead is None else dead | window.dead


def _below(softened: Tensor, floor: Tensor) -> Tensor | None:
    """Where the distance will be clamped; None where a CPU sees at a glance that it is nowhere."""
    if softened.device.type == "cpu" and bool(softened.amin() >= floor.amax()):
        return None
    return softened < floor


def _soft_factor(problem: Problem, block: Block, distance_sq: Tensor) -> Tensor:
    return (1.0 - distance_sq / problem.heads_of(problem.radius_sq, block)).relu_()


def _inside(problem: Problem, block: Block, distance_sq: Tensor) -> Tensor:
    radius_sq = problem.heads_of(problem.radius_sq, block)
    return (radius_sq - distance_sq).div_(problem.cutoff_width)


def _through_cutoff(
    problem: Problem, block: Block, scores: Scores, grad: Tensor, grads: dict[str, Tensor]
) -> Tensor | None:
    """`grad` from dL/dscore to before the cutoff, in place. Returns dL/d(d^2) by the cutoff."""
    if problem.cutoff is None:
        return None
    distance_sq = scores.distance_sq
    if problem.cutoff == "soft":
        factor = _soft_factor(problem, block, distance_sq)
        slope = (grad * scores.uncut).masked_fill_(factor == 0.0, 0.0)
        slope.div_(problem.heads_of(problem.radius_sq, block))
        relative = distance_sq / problem.heads_of(problem.radius_sq, block)
        _add_per_head(grads["radius_sq"], block, problem, slope * relative)
        grad.mul_(factor)
    else:
        # The derivative of logsigmoid(x) is sigmoid(-x).
        slope = torch.sigmoid_(-_inside(problem, block, distance_sq)).mul_(grad)
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
    _logarithm(problem, block, softened, spare).mul_(grad)
    problem.rows_of(grads["strength"], block).copy_(spare.sum(-1).neg_())
    if problem.key_term is not None:
        problem.key_columns(grads["key_term"], block).add_(grad.sum(3, keepdim=True))
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
    softened, spare = scores.softened, scores.weights
    if problem.key_term is not None:
        _unweighted(problem, block, softened, strength, spare)
        spare.mul_(grad)
        problem.key_columns(grads["key_term"], block).add_(spare.sum(3, keepdim=True))
        grad.mul_(problem.key_columns(problem.key_term, block))
    if problem.offset is not None:
        problem.rows_of(grads["offset"], block).copy_(grad.sum(-1))
    strength_rows = problem.rows_of(grads["strength"], block)
    if softened is None:
        _add_to_table(problem, block, torch.mul(grad, strength, out=spare), grads)
        strength_rows.copy_(grad.mul_(problem.table_of(problem.table, block)).sum(-1))
        return
    grad.div_(softened)
    strength_rows.copy_(grad.sum(-1))
    grad.div_(softened)


def _add_to_table(problem: Problem, block: Block, part: Tensor, grads: dict[str, Tensor]) -> None:
    total = problem.table_of(grads["table"], block)
    total.add_(part.sum_to_size(total.shape))


def _add_per_head(total: Tensor, block: Block, problem: Problem, part: Tensor) -> None:
    total.view(problem.sizes[1:3])[block.heads] += part.sum((0, 3, 4))
