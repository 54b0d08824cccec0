"""Optimiser groups: masses and softenings learn faster than weights, and are never decayed."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Trainer

from ..layers.parameters import GravityParameters

DEFAULT_GRAVITY_SCALE = 30.0


def gravity_param_groups(
    model: nn.Module,
    learning_rate: float,
    *,
    gravity_scale: float = DEFAULT_GRAVITY_SCALE,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Optimiser groups of the trainable parameters, gravity's own last.

    A mass enters through softplus, so a mass of 100 moves by one learning rate a step like a mass
    of
    1: without a rate of their own, masses stand still. Decay would pull every mass to softplus(0).

    Args:
        model: patched, with or without LoRA.
        learning_rate: of the weights; gravity's is `learning_rate * gravity_scale`.
        gravity_scale: how much faster masses and softenings learn.
        weight_decay: of the weights that have two dimensions or more; never of gravity's.

    Returns:
        Groups for any torch optimiser; empty ones are left out.
    """
    gravity_ids = _gravity_ids(model)
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    gravity: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in gravity_ids:
            gravity.append(parameter)
        else:
            (decayed if parameter.dim() > 1 else plain).append(parameter)
    groups = [
        {"params": decayed, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": plain, "lr": learning_rate, "weight_decay": 0.0},
        {"params": gravity, "lr": learning_rate * gravity_scale, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class GravityTrainer(Trainer):
    """transformers' Trainer in which masses and softenings have a group of their own.

    Args:
        gravity_scale: how much faster masses and softenings learn than weights.
    """

    def __init__(
        self, *args: Any, gravity_scale: float = DEFAULT_GRAVITY_SCALE, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.gravity_scale = gravity_scale

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            super().create_optimizer(model)
            _split_gravity_group(
                self.optimizer,
                _gravity_ids(self.model if model is None else model),
                self.args.learning_rate * self.gravity_scale,
            )
        return self.optimizer


def _gravity_ids(model: nn.Module) -> set[int]:
    modules = (module for module in model.modules() if isinstance(module, GravityParameters))
    return {id(parameter) for module in modules for parameter in module.parameters()}


def _split_gravity_group(
    optimizer: torch.optim.Optimizer, gravity_ids: set[int], learning_rate: float
) -> None:
    gravity: list[nn.Parameter] = []
    for group in optimizer.param_groups:
        gravity += [p for p in group["params"] if id(p) in gravity_ids]
        group["params"] = [p for p in group["params"] if id(p) not in gravity_ids]
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    if gravity:
        optimizer.add_param_group({"params": gravity, "lr": learning_rate, "weight_decay": 0.0})
