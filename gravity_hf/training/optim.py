"""Optimiser groups: masses and softenings learn faster than weights, and are never decayed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..integration.own_models import own_constants, own_gravity_parameters, own_tables
from ..layers.parameters import GravityParameters
from .distributed import check_strategy, fsdp2_options, saves_shards, shard_gravity

DEFAULT_GRAVITY_SCALE = 30.0
# Masses of hosts go through a softplus and reach hundreds; G is near 1 and positions near 0.02,
# which 30 times a usual rate throws about: on the tasks of `training.recall` (250 steps, learning
# rates 1e-3 and 3e-3, one seed) an LGT is right in 99.8 to 100 % of all places at 1, and in 83 to
# 97 % at 30.
OWN_GRAVITY_SCALE = 1.0


def gravity_param_groups(
    model: nn.Module,
    learning_rate: float,
    *,
    gravity_scale: float | None = None,
    weight_decay: float = 0.0,
) -> list[dict[str, Any]]:
    """Optimiser groups of the trainable parameters, gravity's own last.

    A mass enters through softplus, so a mass of 100 moves by one learning rate a step like a mass
    of 1: without a rate of their own, masses stand still. Decay would pull every mass to
    softplus(0).

    In a model that is gravity by construction (LGT, the tri-model, NGT, the published modules),
    gravity's own are the constants of its heads; see `own_constants`. Decay would weaken every
    force. Tables of masses and of places have the rate of the weights, and no decay either. Maps
    between vectors learn and decay as other weights do.

    Args:
        model: patched, with or without LoRA; or gravity by construction.
        learning_rate: of the weights; gravity's is `learning_rate * gravity_scale`.
        gravity_scale: how much faster gravity's own learn than weights. None:
            `DEFAULT_GRAVITY_SCALE` for patched models, `OWN_GRAVITY_SCALE` for those that are
            gravity by construction.
        weight_decay: of the weights that have two dimensions or more; never of gravity's or of
            tables.

    Returns:
        Groups for any torch optimiser; empty ones are left out.
    """
    gravity_ids, table_ids = _gravity_ids(model), _table_ids(model)
    scale = _scale(model, gravity_scale)
    decayed: list[nn.Parameter] = []
    plain: list[nn.Parameter] = []
    gravity: list[nn.Parameter] = []
    for parameter in model.parameters():
        if not parameter.requires_grad:
            continue
        if id(parameter) in gravity_ids:
            gravity.append(parameter)
        else:
            undecayed = parameter.dim() < 2 or id(parameter) in table_ids
            (plain if undecayed else decayed).append(parameter)
    groups = [
        {"params": decayed, "lr": learning_rate, "weight_decay": weight_decay},
        {"params": plain, "lr": learning_rate, "weight_decay": 0.0},
        {"params": gravity, "lr": learning_rate * scale, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class GravityTrainer(Trainer):
    """transformers' Trainer in which masses and softenings have a group of their own, and stay
    float32 under FSDP2 (`accelerate launch`, or `TrainingArguments(fsdp=True)`).

    Of a model that is gravity by construction the group is that of `gravity_param_groups`;
    under FSDP2 such a model is sharded as any other model is.

    Args:
        gravity_scale: how much faster gravity's own learn than weights; see `gravity_param_groups`.

    Raises:
        ValueError: a way of sharding that would round the masses or lose them (DeepSpeed, FSDP1,
            some settings of FSDP2).
    """

    def __init__(self, *args: Any, gravity_scale: float | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gravity_scale = _scale(self.model, gravity_scale)
        if _mass_ids(self.model):
            check_strategy(self.accelerator, self.model)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        target = self.model if model is None else model
        # The last moment before accelerate shards the layers, and their masses with them.
        options = fsdp2_options(self.accelerator)
        if options is not None and _mass_ids(target):
            shard_gravity(target, **options)
        if self.optimizer is None:
            super().create_optimizer(model)
            _split_groups(
                self.optimizer,
                (_table_ids(target), self.args.learning_rate),
                (_gravity_ids(target), self.args.learning_rate * self.gravity_scale),
            )
        return self.optimizer

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        try:
            super()._load_optimizer_and_scheduler(checkpoint)
        except ValueError as error:
            if "parameter group" not in str(error):
                raise
            raise ValueError(
                f"{checkpoint}: expected the optimiser's groups of this run (weights, what is not "
                f"decayed, tables, gravity), got others ({error}): another version of this library "
                "or other settings wrote it. Train on with those, or begin in another folder"
            ) from error

    def create_scheduler(self, *args: Any, **kwargs: Any) -> Any:
        # The first moment after accelerate has given the optimizer the sharded parameters. It tells
        # them apart by address, which masses have not where there are fewer than processes.
        if fsdp2_options(self.accelerator) is not None:
            mass_ids = _mass_ids(self.model)
            gravity = [p for p in self.model.parameters() if id(p) in mass_ids]
            trained = [p for p in gravity if p.requires_grad]
            if trained:
                self.optimizer.param_groups[-1]["params"] = trained
        return super().create_scheduler(*args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in transformers; under FSDP2 with SHARDED_STATE_DICT, where transformers writes
        nothing here, the whole model or adapter all the same. Checkpoints to resume from stay
        sharded."""
        folder = self.args.output_dir if output_dir is None else output_dir
        is_checkpoint = Path(folder).name.startswith(PREFIX_CHECKPOINT_DIR)
        if saves_shards(self.accelerator) and not is_checkpoint:
            state = self.accelerator.get_state_dict(self.model)
            if self.args.should_save:
                self._save(folder, state_dict=state)
        super().save_model(output_dir, _internal_call)


def _gravity_ids(model: nn.Module) -> set[int]:
    return _mass_ids(model) | {id(parameter) for parameter in own_constants(model)}


def _table_ids(model: nn.Module) -> set[int]:
    return {id(parameter) for parameter in own_tables(model)}


def _scale(model: nn.Module, given: float | None) -> float:
    if given is not None:
        return given
    is_own = any(True for _ in own_gravity_parameters(model))
    return OWN_GRAVITY_SCALE if is_own else DEFAULT_GRAVITY_SCALE


def _mass_ids(model: nn.Module) -> set[int]:
    """Of patched models: what FSDP2 has to keep whole and in float32."""
    modules = (module for module in model.modules() if isinstance(module, GravityParameters))
    return {id(parameter) for module in modules for parameter in module.parameters()}


def _split_groups(optimizer: torch.optim.Optimizer, *groups: tuple[set[int], float]) -> None:
    """Parameters by their ids into groups of their own, each with its rate, without decay."""
    found = []
    for ids, learning_rate in groups:
        mine: list[nn.Parameter] = []
        for group in optimizer.param_groups:
            mine += [p for p in group["params"] if id(p) in ids]
            group["params"] = [p for p in group["params"] if id(p) not in ids]
        found.append({"params": mine, "lr": learning_rate, "weight_decay": 0.0})
    optimizer.param_groups[:] = [group for group in optimizer.param_groups if group["params"]]
    for group in found:
        if group["params"]:
            optimizer.add_param_group(group)
