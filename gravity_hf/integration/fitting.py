"""Masses and softenings of least KL(host attention || gravity attention), over streamed batches.

A grid of softness factors, each with the best mass that Newton's iteration finds for it, then finer
ones beside the best (`fit_softening`) or around the edge of a KL budget (`fit_budget`). All heads
of all modules advance together: one pass over the batches serves them all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .candidates import Candidates
from .closed_form import Solution
from .passes import Passes

_GRID_PASSES, _FINER_PASSES = 8, 4
_SOFTENING_GRID, _SOFTENING_ROUNDS = 7, 2
_BUDGET_GRID, _BUDGET_ROUNDS = 8, 3
# The budget is aimed at from just below, so that the last rounding does not exceed it.
_MARGIN = 1e-3
# Finer than this, softness factors are not told apart: a ratio of 1 + 2 %.
_FINEST = 0.02

# How many passes the two fits need at most.
SOFTENING_PASSES = _GRID_PASSES + _SOFTENING_ROUNDS * _FINER_PASSES
BUDGET_PASSES = _GRID_PASSES + _BUDGET_ROUNDS * _FINER_PASSES


def fit_softening(passes: Passes, modules: Mapping[str, Candidates]) -> dict[str, Solution]:
    """Mass and softness factor of least KL for every group, factors up to the ceiling."""
    bare = all(candidates.ceiling == 0.0 for candidates in modules.values())
    points = 1 if bare else _SOFTENING_GRID
    _round(passes, modules, _grid(points), _GRID_PASSES)
    spacing = 1.0 / max(points - 1, 1)
    for _ in range(0 if bare else _SOFTENING_ROUNDS):
        spacing /= 3.0
        _round(passes, modules, _beside_the_best(spacing), _FINER_PASSES)
    return {name: c.solution(c.kl.argmin(0)) for name, c in modules.items()}


def fit_budget(
    passes: Passes, modules: Mapping[str, Candidates], max_kl: float
) -> dict[str, Solution]:
    """The smallest softness factor of every group with no head above `max_kl`, at its best mass;
    the ceiling where there is none."""
    goal = max_kl * (1.0 - _MARGIN)
    _round(passes, modules, _grid(_BUDGET_GRID), _GRID_PASSES)
    for _ in range(_BUDGET_ROUNDS):
        _round(passes, modules, lambda c: _below_the_least(c, goal), _FINER_PASSES)
    return {name: c.solution(_least_within(c, goal)[0]) for name, c in modules.items()}


_Proposal = Callable[[Candidates], tuple[Tensor, Tensor]]


def _round(
    passes: Passes, modules: Mapping[str, Candidates], proposal: _Proposal, limit: int
) -> None:
    for candidates in modules.values():
        candidates.propose(*proposal(candidates))
    for _ in range(limit):
        if not any(candidates.is_busy for candidates in modules.values()):
            break
        trials = {name: candidates.trials() for name, candidates in modules.items()}
        passes.run(trials)
        for name, candidates in modules.items():
            candidates.learn(trials[name])
    for candidates in modules.values():
        candidates.close()


def _grid(points: int) -> _Proposal:
    def proposal(candidates: Candidates) -> tuple[Tensor, Tensor]:
        x = torch.linspace(0.0, 1.0, points, dtype=torch.float64)
        position = x[:, None].expand(-1, candidates.groups).clone()
        # Where no factor up to the ceiling exceeds the base epsilon, they are all one candidate.
        wanted = (position == x[-1]) | (candidates.range > 0)
        return position, wanted

    return proposal


def _beside_the_best(spacing: float) -> _Proposal:
    def proposal(candidates: Candidates) -> tuple[Tensor, Tensor]:
        best = candidates.position.gather(0, candidates.kl.argmin(0)[None])
        steps = torch.tensor([-2.0, -1.0, 1.0, 2.0], dtype=torch.float64)[:, None]
        position = best + spacing * steps
        wanted = (position > 0) & (position < 1) & (candidates.range > 0)
        return position.clamp(0.0, 1.0), wanted

    return proposal


def _below_the_least(candidates: Candidates, goal: float) -> tuple[Tensor, Tensor]:
    chosen, found = _least_within(candidates, goal)
    upper = candidates.position.gather(0, chosen[None])
    below = candidates.position.masked_fill(candidates.position >= upper, -1.0)
    lower = below.amax(0, keepdim=True)
    shares = torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64)[:, None]
    position = lower + (upper - lower) * shares
    wanted = found & (lower >= 0) & ((upper - lower) * candidates.range > _FINEST)
    return position.clamp(0.0, 1.0), wanted.expand_as(position)


def _least_within(candidates: Candidates, goal: float) -> tuple[Tensor, Tensor]:
    """Index of the lowest position within the budget, or of the ceiling; whether there is one."""
    within = candidates.worst_kl <= goal
    found = within.any(0)
    position = torch.where(within, candidates.position, torch.full_like(candidates.position, 2.0))
    ceiling = candidates.position.masked_fill(candidates.kl.isinf(), -1.0).argmax(0)
    return torch.where(found, position.argmin(0), ceiling), found
