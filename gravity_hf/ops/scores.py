"""The scores of one block. Formulas: README.md; derivatives: score_gradients.py.

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
from .space import Space


@dataclass(frozen=True)
class Scores:
    """A block's weights `[b, n, G, rows, keys]` after the softmax, and what its derivative needs.

    softened: `d^2 + eps`, with `d^2` clamped, or `D + eps`. logarithm: of it, under the power law.
    unclamped: 0 where `d^2` was negative, 1 elsewhere. distance_sq: `d^2`. capped: where the score
    exceeded `max_force`, or the `tanh` of a smooth one. bend: the `tanh` of a soft cap. uncut:
    scores before a soft cutoff. dead: `[..., rows, 1]`, rows that see nothing; their weights are
    finite and mean nothing. sink_weight: of the sink, `[..., rows, 1]`. What is not needed is None.
    """

    weights: Tensor
    softened: Tensor | None = None
    logarithm: Tensor | None = None
    unclamped: Tensor | None = None
    distance_sq: Tensor | None = None
    capped: Tensor | None = None
    uncut: Tensor | None = None
    dead: Tensor | None = None
    bend: Tensor | None = None
    sink_weight: Tensor | None = None


def block_scores(problem: Problem, block: Block, space: Space, *, differentiable: bool) -> Scores:
    """Where nothing will be differentiated, the weights overwrite the distances."""
    softened = unclamped = distance_sq = logarithm = capped = uncut = bend = sink_weight = None
    shape = problem.shape(block)
    if problem.table is None:
        distance_sq, softened, unclamped = _distances(problem, block, space, differentiable)
        score = space.take("score", shape) if differentiable else softened
    else:
        score = space.take("score", shape)
    if problem.softcap is not None:
        bend = capped_scores(problem, block, softened, score)
    elif problem.law == "power":
        logarithm = space.take("logarithm", shape) if differentiable else score
        _power(problem, block, softened, logarithm, score)
    else:
        _force(problem, block, softened, score)
    if problem.max_force is not None:
        capped = _cap(problem, score, differentiable)
    if problem.cutoff == "soft":
        uncut = score.clone() if differentiable else None
        score.mul_(soft_factor(problem, block, distance_sq))
    elif problem.cutoff == "log":
        score.add_(torch.nn.functional.logsigmoid(_inside(problem, block, distance_sq)))
    # What is overwritten here is of no more use, or not yet.
    spare = space.take("gradient", shape) if differentiable else distance_sq
    dead = _hide(problem, block, score, distance_sq, spare)
    if problem.sink is None:
        weights = torch.softmax(score, -1, out=score)
    else:
        weights, sink_weight = score, softmax_beside_sink(problem, block, score)
    return Scores(
        weights,
        softened,
        logarithm,
        unclamped,
        distance_sq,
        capped,
        uncut,
        dead,
        bend,
        sink_weight,
    )


def _distances(
    problem: Problem, block: Block, space: Space, differentiable: bool
) -> tuple[Tensor | None, Tensor, Tensor | None]:
    """`distance_sq`, `softened` and `unclamped` of `Scores`."""
    shape = problem.shape(block)
    distance_sq = problem.product(block, space.take("distance", shape))
    eps, curvature = problem.heads_of(problem.eps, block), problem.curvature
    with_eps = problem.cutoff is None and curvature is None
    floor = eps if with_eps else torch.zeros_like(eps)
    unclamped = None
    # Under a curvature the slope of what will be clamped is 0.
    if differentiable and curvature is None:
        unclamped = _unclamped(distance_sq, floor, space)
    torch.maximum(distance_sq, floor, out=distance_sq)
    if with_eps:
        return None, distance_sq, unclamped
    distance = distance_sq if curvature is None else curvature.distance(distance_sq)
    return distance_sq, torch.add(distance, eps, out=space.take("softened", shape)), unclamped


def _unclamped(distance: Tensor, floor: Tensor, space: Space) -> Tensor | None:
    """1 where the distance will not be clamped and 0 where it will; None where a CPU sees at a
    glance that it is nowhere."""
    if distance.device.type == "cpu" and bool(distance.amin() >= floor.amax()):
        return None
    # In the distances' dtype: on a CPU to use a mask of bools costs more than a product.
    return space.take("unclamped", distance.shape).copy_(distance).ge_(floor)


def _power(
    problem: Problem, block: Block, softened: Tensor | None, logarithm: Tensor, out: Tensor
) -> None:
    """`-strength ln(n) + key` into `out`, which may be `softened`; `logarithm`, which may be `out`,
    gets `ln(n)`."""
    strength = problem.rows_of(problem.strength, block).unsqueeze(-1)
    if softened is None:
        table = problem.table_of(problem.table, block)
        logarithm.copy_(table.log().neg_().expand_as(logarithm))
    else:
        torch.log(softened, out=logarithm)
    torch.mul(logarithm, -strength, out=out)
    if problem.key_term is not None:
        out.add_(problem.key_columns(problem.key_term, block))


def _force(problem: Problem, block: Block, softened: Tensor | None, out: Tensor) -> None:
    """`(strength / n + offset) key` into `out`, which may be `softened`."""
    strength = problem.rows_of(problem.strength, block).unsqueeze(-1)
    if softened is None:
        torch.mul(strength, problem.table_of(problem.table, block).expand_as(out), out=out)
    else:
        torch.div(strength, softened, out=out)
    if problem.offset is not None:
        out.add_(problem.rows_of(problem.offset, block).unsqueeze(-1))
    if problem.key_term is not None:
        out.mul_(problem.key_columns(problem.key_term, block))


def _cap(problem: Problem, score: Tensor, differentiable: bool) -> Tensor | None:
    """The ceiling, in place. Returns what its derivative needs."""
    limit = problem.max_force
    if problem.smooth_cap:
        bend = score.div_(limit).tanh_()
        bend = bend.clone() if differentiable else None
        score.mul_(limit)
        return bend
    capped = score > limit if differentiable else None
    score.clamp_(max=limit)
    return capped


def _hide(
    problem: Problem,
    block: Block,
    score: Tensor,
    distance_sq: Tensor | None,
    spare: Tensor | None,
) -> Tensor | None:
    """-inf for hidden pairs, after what `exclude_self` replaces. Returns the dead rows."""
    window = block.window
    if problem.exclude_self:
        problem.fill_own_pairs(score, block, SELF_SCORE)
    if problem.cutoff == "hard":
        outside = _outside(problem, block, distance_sq, spare)
        score.add_(outside, alpha=torch.finfo(score.dtype).max)
    if window.bias is not None:
        score[..., window.bias_keys].add_(window.bias)
    if problem.cutoff != "hard":
        return window.dead
    dead = score.amax(-1, keepdim=True) == -INFINITY
    if score.device.type == "cpu" and not dead.any():
        return window.dead
    score.masked_fill_(dead, 0.0)
    return dead if window.dead is None else dead | window.dead


def _outside(problem: Problem, block: Block, distance_sq: Tensor, out: Tensor) -> Tensor:
    """Within the radius 0, and outside less than 0 so far that times the dtype's largest value it
    is -inf: in plain arithmetic, which on a CPU costs a fraction of what a mask of bools does."""
    radius_sq = problem.heads_of(problem.radius_sq, block)
    outside = torch.sub(radius_sq, distance_sq, out=out)
    return outside.clamp_(max=0.0).mul_(torch.finfo(outside.dtype).max)


def soft_factor(problem: Problem, block: Block, distance_sq: Tensor) -> Tensor:
    return (1.0 - distance_sq / problem.heads_of(problem.radius_sq, block)).relu_()


def _inside(problem: Problem, block: Block, distance_sq: Tensor) -> Tensor:
    radius_sq = problem.heads_of(problem.radius_sq, block)
    return (radius_sq - distance_sq).div_(problem.cutoff_width)
