"""A soft cap in a block of scores: how far a score departs from the neutral one of its pair.

The neutral score `s(N_ij)`, `N_ij = |q_i|^2 + kappa_j + eps`, is what the law gives a key at a
right angle to the query. Formulas: README.md.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import Block
from .problem import Problem


class NeutralGradients(NamedTuple):
    """distance: dL/dN `[b, n, G, rows, keys]`. strength: dL/dstrength through neutral scores
    `[b, n, G, rows]`."""

    distance: Tensor
    strength: Tensor


def capped_scores(problem: Problem, block: Block, softened: Tensor, out: Tensor) -> Tensor:
    """`s(N) + c tanh((s(n) - s(N)) / c)` into `out`, which may be `softened`, `n`.

    Returns:
        The `tanh`, which the derivative needs.
    """
    neutral = problem.neutral(block)
    strength = problem.rows_of(problem.strength, block).unsqueeze(-1)
    # Scores may be in the thousands where they differ by ones: the difference is computed first.
    if problem.law == "power":
        excess = torch.log_(softened / neutral).mul_(-strength)
        neutral_score = torch.log(neutral).mul(-strength)
    else:
        excess = (neutral - softened).div_(softened).div_(neutral).mul_(strength)
        neutral_score = strength / neutral
    bend = excess.div_(problem.softcap).tanh_()
    torch.add(neutral_score, bend, alpha=problem.softcap, out=out)
    return bend


def differentiate_softcap(
    problem: Problem, block: Block, bend: Tensor, grad: Tensor
) -> NeutralGradients:
    """`grad` from dL/dscore to dL/ds(n), in place; the rest of it belongs to neutral scores.
    `bend`, the `tanh`, is overwritten."""
    neutral = problem.neutral(block)
    strength = problem.rows_of(problem.strength, block).unsqueeze(-1)
    to_neutral = bend.square_().mul_(grad)
    grad.sub_(to_neutral)
    if problem.law == "power":
        strength_part = (to_neutral * torch.log(neutral)).sum(-1).neg_()
        to_neutral.div_(neutral)
    else:
        to_neutral.div_(neutral)
        strength_part = to_neutral.sum(-1)
        to_neutral.div_(neutral)
    return NeutralGradients(to_neutral.mul_(-strength), strength_part)


def add_neutral(
    problem: Problem, block: Block, neutral: NeutralGradients, grads: dict[str, Tensor]
) -> None:
    """To the gradients of strength and of the columns that hold `N`'s two parts."""
    problem.rows_of(grads["strength"], block).add_(neutral.strength)
    problem.rows_of(grads["q"], block)[..., -1].add_(neutral.distance.sum(-1))
    if not problem.lifted:
        part = problem.keys_of(grads["k"], block)[..., -2]
        part.add_(neutral.distance.sum((2, 3)).flatten(0, 1))
