"""Curvature while training: by the course of the validation loss, or along a line to a target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, TrainerControl, TrainerState

from ..runtime.growth import CurvatureGrowth
from .callback_state import base_model, restore

if TYPE_CHECKING:
    from ..runtime.ledger import Ledger


class MetaCurvatureScheduler:
    """Moves every parameter whose name contains "curvature" by the sign of the validation loss.

    A loss above the one before: `p - lr`; one below: `p + lr`; then clamped to the bounds. No
    gradient is asked. In an LGT these parameters scale the positions, not the distance: at usual
    position lengths 0.15 to 0.5 changes positions by 0.1 %. `CurvatureGrowthCallback` moves the
    curvature of the distance.

    Published, a single noisy batch decides, and an equal loss or one that is NaN counts as worse.
    Here those change nothing, and `smoothing` compares with the running mean of the losses before.

    Args:
        model: one without such parameters is let be.
        lr: how far a parameter moves.
        min_curvature, max_curvature: bounds.
        smoothing: weight of the past in the running mean, in [0, 1); 0: the last loss alone.
        published: equal and NaN losses count as worse, as in the published class.

    Raises:
        ValueError: a value outside its range.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: float = 0.01,
        min_curvature: float = 0.0,
        max_curvature: float = 0.5,
        *,
        smoothing: float = 0.0,
        published: bool = False,
    ) -> None:
        if not 0 <= lr < math.inf:
            raise ValueError(_message("lr", "a finite number >= 0", lr))
        if not min_curvature <= max_curvature:
            bounds = (min_curvature, max_curvature)
            raise ValueError(_message("min_curvature", "at most max_curvature", bounds))
        if not 0 <= smoothing < 1:
            raise ValueError(_message("smoothing", "a number in [0, 1)", smoothing))
        self.model = model
        self.lr = lr
        self.min_curvature = min_curvature
        self.max_curvature = max_curvature
        self.smoothing = smoothing
        self.published = published
        # The running mean of the losses so far; None before the first.
        self.level: float | None = None

    def step(self, val_loss: float) -> dict[str, float]:
        """Take one validation loss: new values by parameter name, empty where nothing moved."""
        loss, level = float(val_loss), self.level
        if not self.published and not math.isfinite(loss):
            return {}
        if level is None:
            self.level = loss
            return {}
        self.level = self.smoothing * level + (1 - self.smoothing) * loss
        if loss == level and not self.published:
            return {}
        better = loss < level
        return self._move(self.lr if better else -self.lr)

    def _move(self, change: float) -> dict[str, float]:
        updates = {}
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "curvature" in name:
                    parameter.add_(change).clamp_(self.min_curvature, self.max_curvature)
                    updates[name] = parameter.mean().item()
        return updates


class MetaCurvatureCallback(TrainerCallback, ExportableState):
    """`MetaCurvatureScheduler` after each evaluation of transformers' Trainer.

    The new values are in effect from the next step on. Trainer saves after it has evaluated, so the
    checkpoint that belongs to an evaluation has the new values already.

    Args:
        lr, min_curvature, max_curvature, smoothing: as in `MetaCurvatureScheduler`.
        metric: name of the loss in the evaluation's metrics.
        ledger: where to log `meta_curvature_update`.

    Raises:
        ValueError: a value outside its range.
        RuntimeError: when training begins, on a model without such parameters; at an evaluation
            whose metrics lack `metric`.
    """

    def __init__(
        self,
        lr: float = 0.01,
        min_curvature: float = 0.0,
        max_curvature: float = 0.5,
        *,
        smoothing: float = 0.7,
        metric: str = "eval_loss",
        ledger: Ledger | None = None,
    ) -> None:
        self._arguments: dict[str, Any] = {
            "lr": lr,
            "min_curvature": min_curvature,
            "max_curvature": max_curvature,
            "smoothing": smoothing,
            "metric": metric,
        }
        self.metric = metric
        self.ledger = ledger
        # The running mean of the losses so far.
        self.level: float | None = None
        self._scheduler = self._made_for(nn.Module())

    def state(self) -> dict[str, Any]:
        """Constructor arguments and progress, JSON-able; transformers stores it in checkpoints."""
        return {"args": self._arguments, "attributes": {"level": self.level}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = base_model(kwargs["model"])
        if not any("curvature" in name for name, _ in model.named_parameters()):
            raise RuntimeError(
                "MetaCurvatureCallback: expected a model with curvature parameters, such as an "
                f"LGT, got {type(model).__name__} without. Leave the callback out"
            )
        restore(self, state)
        self._scheduler = self._made_for(model)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: Mapping[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        metrics = metrics or {}
        if self.metric not in metrics:
            raise RuntimeError(
                f"MetaCurvatureCallback.metric: expected one of {sorted(metrics)}, got "
                f"{self.metric!r}. With several evaluation sets, name the loss of one of them"
            )
        self._scheduler.level = self.level
        updates = self._scheduler.step(metrics[self.metric])
        self.level = self._scheduler.level
        if updates and self.ledger is not None and state.is_world_process_zero:
            self.ledger.log("meta_curvature_update", {"updates": updates})

    def _made_for(self, model: nn.Module) -> MetaCurvatureScheduler:
        options = {name: value for name, value in self._arguments.items() if name != "metric"}
        return MetaCurvatureScheduler(model, **options)


class CurvatureGrowthCallback(TrainerCallback, ExportableState):
    """Moves the curvature of the distance linearly from its value to a target.

    After step t of `steps` it is `start + (target - start) t / steps`: nothing changes at the
    moment when growth begins. The model's config follows, so every checkpoint states the curvature
    it has; a resumed run goes on along the same line. An adapter of peft does not hold it: save
    the merged model.

    Args:
        model: with a settable `curvature`, as an LGT has; or any model with such modules in it.
            None: the one that Trainer trains.
        target: where the curvature ends; for modules of `model`, a mapping from their names, such
            as `{"world_model": 0.3}`.
        steps: optimiser steps from start to end, at least 1.
        ledger: where to log `curvature_growth` once the target is reached.

    Raises:
        ValueError: fewer steps than 1, or a target outside of (-1, 1).
        TypeError: a model without `curvature`, or a module that is not there.
        Both at once where a model is given, else when training begins.

    Example:
        >>> Trainer(model, ..., callbacks=[CurvatureGrowthCallback(model, 0.3, 1000)])
    """

    def __init__(
        self,
        model: nn.Module | None,
        target: float | Mapping[str, float],
        steps: int,
        *,
        ledger: Ledger | None = None,
    ) -> None:
        self.target = _targets(target)
        self.steps = steps
        self.ledger = ledger
        self.taken = 0
        # Curvature at the beginning, by module name.
        self.start: dict[str, float] = {}
        self._model = model
        self._growths = {} if model is None else self._begun(model)

    def state(self) -> dict[str, Any]:
        """Constructor arguments and progress, JSON-able; transformers stores it in checkpoints."""
        return {
            "args": {"model": None, "target": self.target, "steps": self.steps},
            "attributes": {"taken": self.taken, "start": self.start},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = base_model(kwargs["model"]) if self._model is None else self._model
        self._growths = self._begun(model)
        restore(self, state)
        if self.start:
            self._go_on()
        else:
            self.start = {name: growth.start for name, growth in self._growths.items()}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.taken >= self.steps:
            return
        self.taken += 1
        for growth in self._growths.values():
            growth.step()
        done = self.taken == self.steps and state.is_world_process_zero
        if done and self.ledger is not None:
            grown = {"step": state.global_step, "from": self.start, "to": self.target}
            self.ledger.log("curvature_growth", grown)

    def _begun(self, model: nn.Module) -> dict[str, CurvatureGrowth]:
        modules = dict(model.named_modules())
        for name in self.target:
            if not _has_curvature(modules.get(name)):
                have = [n for n, module in modules.items() if _has_curvature(module)]
                named = f"Name one of {have}" if have else "Only a curved distance can grow"
                raise TypeError(
                    f"CurvatureGrowthCallback.target: expected a model, or names of its modules, "
                    f"with a settable curvature, got {name!r} of {type(model).__name__}. {named}"
                )
        return {
            name: CurvatureGrowth(modules[name], end, self.steps)
            for name, end in self.target.items()
        }

    def _go_on(self) -> None:
        """From where an earlier run had come to."""
        for name, growth in self._growths.items():
            growth.start = self.start[name]
            if self.taken == 0:
                growth.model.curvature = growth.start
            else:
                growth.taken = self.taken - 1
                growth.step()


def _targets(target: float | Mapping[str, float]) -> dict[str, float]:
    """By module name; "" is the model itself."""
    if isinstance(target, Mapping):
        return {name: float(value) for name, value in target.items()}
    return {"": float(target)}


def _has_curvature(module: nn.Module | None) -> bool:
    """Whether it can be set: embeddings have one that is a tensor."""
    return isinstance(getattr(type(module), "curvature", None), property)


def _message(field: str, expected: str, got: object) -> str:
    return f"MetaCurvatureScheduler.{field}: expected {expected}, got {got!r}"
