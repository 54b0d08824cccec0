"""One optimiser whose parameter groups follow the groups that are governed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainingArguments

from ...integration.own_models import own_constants, own_gravity_parameters, own_tables
from ...layers.parameters import GravityParameters
from ..optim import DEFAULT_GRAVITY_SCALE, OWN_GRAVITY_SCALE

GROUP_KEY = "governed_group"
# What optimisers of other kinds are given in place of groups.
_OF_ITS_OWN = ("params", "model", "optimizer_dict")


def governed_optimizer(
    model: nn.Module,
    args: TrainingArguments,
    members: Mapping[str, Sequence[nn.Parameter]],
    gravity_scale: float | None = None,
) -> torch.optim.Optimizer:
    """The optimiser of `args` over all groups, those that are not active yet among them.

    Weights decay, and gravity's own learn, as in `GravityTrainer`; only how parameters are split
    differs, so that each group has a rate of its own.

    Args:
        model: what is trained.
        args: kind of optimiser, rate, betas, decay.
        members: parameters by group.
        gravity_scale: see `gravity_param_groups`.

    Raises:
        ValueError: a kind of optimiser that makes its own groups (GaLore, LOMO, layerwise ones).
    """
    kind, options = Trainer.get_optimizer_cls_and_kwargs(args, model)
    taken = [name for name in _OF_ITS_OWN if name in options]
    if taken or not (isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)):
        raise ValueError(
            f"GovernedTraining.optimizers: expected an optimiser over groups of parameters, got "
            f"optim={str(args.optim.value if hasattr(args.optim, 'value') else args.optim)!r}, "
            "which makes its own. Take optim='adamw_torch'"
        )
    # Reads nothing of the trainer.
    decayed = set(Trainer.get_decay_parameter_names(None, model))
    rates = _own_rates(model, args.learning_rate, gravity_scale)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    groups = []
    for name, parameters in members.items():
        split: dict[tuple[float, float], list[nn.Parameter]] = {}
        for parameter in parameters:
            rate = rates.get(id(parameter))
            if rate is not None:
                key = (rate, 0.0)
            else:
                decays = names[id(parameter)] in decayed
                key = (args.learning_rate, args.weight_decay if decays else 0.0)
            split.setdefault(key, []).append(parameter)
        groups += [
            {"params": those, "lr": rate, "weight_decay": decay, GROUP_KEY: name}
            for (rate, decay), those in split.items()
        ]
    return kind(groups, **options)


def check_optimizer(optimizer: Any, members: Mapping[str, Sequence[nn.Parameter]]) -> None:
    """Raise ValueError unless each group of parameters is one of `governed_optimizer`'s."""
    found: dict[str, set[int]] = {}
    for group in optimizer.param_groups:
        ids = {id(parameter) for parameter in group["params"]}
        found.setdefault(group.get(GROUP_KEY, ""), set()).update(ids)
    wanted = {name: {id(p) for p in parameters} for name, parameters in members.items()}
    if found != wanted:
        raise ValueError(
            f"GovernedTraining: expected an optimiser with the groups {sorted(wanted)}, got one "
            f"with {sorted(found)}. Pass optimizers=governed.optimizers(model, args) to Trainer"
        )


class Rates:
    """Multiplies the scheduled rates for one step, and puts them back before the scheduler goes
    on: some schedules count on what they find."""

    def __init__(self, optimizer: Any) -> None:
        self._groups: list[dict[str, Any]] = optimizer.param_groups
        self._scheduled: list[float] = []

    def multiply(self, multipliers: Mapping[str, float]) -> None:
        """By group; a group that is not named keeps its rate."""
        self._scheduled = [float(group["lr"]) for group in self._groups]
        for group, rate in zip(self._groups, self._scheduled, strict=True):
            multiplier = multipliers.get(group[GROUP_KEY], 1.0)
            if multiplier != 1.0:
                _set(group, rate * multiplier)

    def restore(self) -> None:
        """After the optimiser's step."""
        for group, rate in zip(self._groups, self._scheduled, strict=False):
            _set(group, rate)
        self._scheduled = []


def owned_in_order(
    model: nn.Module, members: Mapping[str, Sequence[nn.Parameter]]
) -> Iterator[tuple[str, nn.Parameter]]:
    """Group and parameter, in the model's order."""
    owner = {id(p): name for name, parameters in members.items() for p in parameters}
    for parameter in model.parameters():
        if id(parameter) in owner:
            yield owner[id(parameter)], parameter


def _own_rates(model: nn.Module, rate: float, gravity_scale: float | None) -> dict[int, float]:
    """Rates of what never decays because it is gravity's own, by the parameter's id."""
    modules = [module for module in model.modules() if isinstance(module, GravityParameters)]
    masses = [parameter for module in modules for parameter in module.parameters()]
    is_own = any(True for _ in own_gravity_parameters(model))
    usual = OWN_GRAVITY_SCALE if is_own else DEFAULT_GRAVITY_SCALE
    scale = usual if gravity_scale is None else gravity_scale
    rates = {id(parameter): rate for parameter in own_tables(model)}
    return rates | {id(p): rate * scale for p in (*masses, *own_constants(model))}


def _set(group: dict[str, Any], rate: float) -> None:
    # A compiled optimiser keeps its rate on the device.
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
