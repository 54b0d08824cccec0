"""Lowering the softening while training holds the loss: from close to the host towards gravity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments
from transformers.trainer_callback import ExportableState, TrainerState

from ..config import EPSILON_FLOOR
from ..integration.calibration_report import CalibrationReport
from ..integration.hosts import gravity_modules, settings_of
from ..layers.parameters import GravityParameters, inverse_softplus

Distances = CalibrationReport | Mapping[str, Sequence[float]]

_ATTRIBUTES = ("taken", "start", "typical", "softness", "level", "bar", "paused", "history")


class SofteningAnnealing(TrainerCallback, ExportableState):
    """Lowers every head's softening along a geometric schedule, and waits while the loss is up.

    Step `t` of `steps` sets each softening to `start * fraction ** (t / steps)`, and changes the
    mass so that the slope of the score at the head's typical squared distance D stays:
    `M' = M (D + eps') / (D + eps)` (force) or `M' = M sqrt((D + eps') / (D + eps))` (power); heads
    that share a mass share the mean factor. The schedule owns the softenings until training ends:
    what an optimiser step does to one is undone, what it does to a mass is kept.

    The loss is the one that Trainer logs, the mean over all processes, so set `logging_steps` small
    (1 to 10). Nothing is lowered before the first log. After each log the loss is smoothed; while
    it is above reference + tolerance the schedule stands still, and goes on once it is back.

    The settings' `softness` in the model's config (and in the adapter's, under peft) is kept at
    what is in force, so that every checkpoint states its true softness. Checkpoints carry the
    state: a resumed run goes on where it stopped. `history` has one entry for each log.

    Args:
        steps: optimiser steps from start to end, waiting not counted.
        fraction: where it ends, as a fraction of each softening at the start, in (0, 1].
        softness: where it ends, as a softness factor; needs a model calibrated with a known one.
            Give this or `fraction`.
        tolerance: nats (or whatever the loss is in) above the reference that are let pass.
        reference: the loss to hold; None takes the first one logged.
        smoothing: weight of the past in the smoothed loss, in [0, 1).
        distances: the report of `calibrate` (its `mean_distance`), or typical squared distances by
            attention module name, one for each head. None solves the closed form of calibration for
            them, which holds while the masses are still calibrated.

    Raises:
        ValueError: a value outside its range.
        RuntimeError: when training begins, on a model that is not patched, has no softenings of its
            own, or cannot tell its softness; or if nothing is ever logged.
    """

    def __init__(
        self,
        steps: int,
        fraction: float | None = None,
        softness: float | None = None,
        *,
        tolerance: float = 0.02,
        reference: float | None = None,
        smoothing: float = 0.7,
        distances: Distances | None = None,
    ) -> None:
        if steps < 1:
            raise ValueError(_message("steps", "at least 1", steps))
        if (fraction is None) == (softness is None):
            raise ValueError(
                _message("fraction, softness", "exactly one of them", (fraction, softness))
            )
        if fraction is not None and not 0 < fraction <= 1:
            raise ValueError(_message("fraction", "a number in (0, 1]", fraction))
        if softness is not None and not 0 < softness < math.inf:
            raise ValueError(_message("softness", "a finite number > 0", softness))
        if not 0 <= tolerance < math.inf:
            raise ValueError(_message("tolerance", "a finite number >= 0", tolerance))
        if not 0 <= smoothing < 1:
            raise ValueError(_message("smoothing", "a number in [0, 1)", smoothing))
        self._arguments: dict[str, Any] = {
            "steps": steps,
            "fraction": fraction,
            "softness": softness,
            "tolerance": tolerance,
            "reference": reference,
            "smoothing": smoothing,
            "distances": _by_module(distances),
        }
        # Steps of the schedule taken so far.
        self.taken = 0
        # By attention module name, per head: softenings at the start, typical squared distances.
        self.start: dict[str, list[float]] = {}
        self.typical: dict[str, list[float]] = {}
        # The softness factor at the start; None for a model that states none.
        self.softness: float | None = None
        # The smoothed loss, and the one to hold.
        self.level: float | None = None
        self.bar: float | None = reference
        self.paused = False
        self.history: list[dict[str, Any]] = []

    @property
    def fraction(self) -> float:
        """What is in force now: each softening as a fraction of its start."""
        return self._target() ** (self.taken / self._arguments["steps"])

    @property
    def finished(self) -> bool:
        return self.taken >= self._arguments["steps"]

    def state(self) -> dict[str, Any]:
        """Constructor arguments and progress, JSON-able; transformers stores it in checkpoints."""
        return {
            "args": self._arguments,
            "attributes": {name: getattr(self, name) for name in _ATTRIBUTES},
        }

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        model = _base(kwargs["model"])
        if args.logging_strategy == "no":
            raise RuntimeError(
                "SofteningAnnealing: expected a logged loss to hold, got logging_strategy='no'. "
                "Set logging_strategy='steps' and logging_steps between 1 and 10"
            )
        modules = _modules_with_softening(model)
        name = type(self).__name__
        stored = state.stateful_callbacks.get(name)
        if state.global_step > 0 and isinstance(stored, dict):
            for attribute in _ATTRIBUTES:
                setattr(self, attribute, stored["attributes"][attribute])
        elif not self.start:
            self._begin(model, modules)
        # Trainer saves into this entry, which a checkpoint from before the annealing lacks.
        state.stateful_callbacks.setdefault(name, self.state())

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        before = self.fraction
        moving = self.bar is not None and self.level is not None
        if moving and not self.paused and not self.finished:
            self.taken += 1
        for name, module in gravity_modules(_base(model)).items():
            self._set(name, module, before)
        if self.softness is not None and self.fraction != before:
            _state_softness(model, self.softness * self.fraction)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: Any,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs:
            return
        loss, keep = logs["loss"], self._arguments["smoothing"]
        self.level = loss if self.level is None else keep * self.level + (1 - keep) * loss
        self.bar = self.level if self.bar is None else self.bar
        # Not-a-number is up, too.
        self.paused = not self.level <= self.bar + self._arguments["tolerance"]
        self.history.append(
            {
                "step": state.global_step,
                "loss": loss,
                "smoothed": self.level,
                "paused": self.paused,
                "fraction": self.fraction,
                "softness": None if self.softness is None else self.softness * self.fraction,
            }
        )

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: Any, **kwargs: Any
    ) -> None:
        if self.softness is not None:
            _state_softness(kwargs["model"], self.softness * self.fraction)

    def _target(self) -> float:
        if self._arguments["fraction"] is not None:
            return float(self._arguments["fraction"])
        return float(self._arguments["softness"]) / self.softness if self.softness else 1.0

    def _begin(self, model: nn.Module, modules: Mapping[str, GravityParameters]) -> None:
        settings = settings_of(model)
        self.softness = None if settings is None else settings.softness
        wanted = self._arguments["softness"]
        if wanted is not None and (not self.softness or wanted > self.softness):
            raise RuntimeError(
                f"SofteningAnnealing: softness {wanted:g}: expected a model calibrated with a "
                f"larger one, got {self.softness}. Call calibrate(model, batches, softness=...) "
                "first, or give fraction="
            )
        given = self._arguments["distances"]
        if given is not None:
            _check_distances(given, modules)
        for name, module in modules.items():
            softening = module().softening.detach().double()
            self.start[name] = softening.tolist()
            self.typical[name] = (
                list(given[name])
                if given is not None
                else _typical_distance(name, model.get_submodule(name), module).tolist()
            )

    def _set(self, name: str, module: GravityParameters, before: float) -> None:
        start, typical = (
            torch.tensor(values[name], dtype=torch.float64, device=module.mass_log.device)
            for values in (self.start, self.typical)
        )
        old, new = ((start * f).clamp(min=EPSILON_FLOOR) for f in (before, self.fraction))
        factor = (typical + new) / (typical + old)
        factor = factor if module.config.law == "force" else factor.sqrt()
        with torch.no_grad():
            module.softening_log.copy_(inverse_softplus(new))
            if self.fraction != before:
                shared = factor.view(module.mass_count, -1).mean(-1)
                mass = nn.functional.softplus(module.mass_log.double())
                module.mass_log.copy_(inverse_softplus(mass * shared))


def _modules_with_softening(model: nn.Module) -> dict[str, GravityParameters]:
    modules = gravity_modules(model)
    if not modules or not all(m.config.learn_softening for m in modules.values()):
        what = "one softening for all heads" if modules else "no gravity"
        raise RuntimeError(
            f"SofteningAnnealing: expected a patched model whose heads have softenings of their "
            f"own, got {type(model).__name__} with {what}. Call patch_with_gravity(model), then "
            "calibrate(model, batches, softness=1.0)"
        )
    return modules


def _typical_distance(name: str, attention: nn.Module, module: GravityParameters) -> Tensor:
    """The closed form of calibration, solved for the distance: float64 `[H]`, at least 0."""
    scaling = getattr(attention, "scaling", None)
    if not isinstance(scaling, float) or scaling <= 0:
        raise RuntimeError(
            f"SofteningAnnealing: {name}: expected the host's scaling on its attention module, got "
            f"{scaling!r}. Pass distances=calibrate(...), the report"
        )
    terms = module()
    mass, softening = terms.mass.detach().double(), terms.softening.detach().double()
    if module.config.law == "force":
        reach = mass / math.sqrt(scaling / 2)
    else:
        reach = 2 * mass.square() / scaling
    return (reach - softening).clamp(min=0.0)


def _by_module(distances: Distances | None) -> dict[str, list[float]] | None:
    if distances is None:
        return None
    if not isinstance(distances, CalibrationReport):
        return {name: [float(value) for value in values] for name, values in distances.items()}
    found: dict[str, list[float]] = {}
    for row in distances.rows:
        found.setdefault(row["layer"], []).append(float(row["mean_distance"]))
    return found


def _check_distances(
    given: Mapping[str, Sequence[float]], modules: Mapping[str, GravityParameters]
) -> None:
    expected = {name: module.query_heads for name, module in modules.items()}
    got = {name: len(values) for name, values in given.items()}
    if expected != got:
        name = next(name for name in (*expected, *got) if expected.get(name) != got.get(name))
        raise RuntimeError(
            f"SofteningAnnealing: distances: expected {expected.get(name, 'no')} for {name}, got "
            f"{got.get(name, 'none')}. Pass the report of calibrate on this very model"
        )


def _state_softness(model: nn.Module, softness: float) -> None:
    base = _base(model)
    settings = settings_of(base)
    if settings is None:
        return
    # A budget that the calibration kept says nothing of what training made of it.
    stated = {"softness": softness, "max_kl": None}
    block = replace(settings, **stated).to_dict()
    base.config.gravity = block
    for adapter in getattr(model, "peft_config", {}).values():
        if getattr(adapter, "gravity", None) is not None:
            adapter.gravity = dict(block)
    for module in base.modules():
        if isinstance(module, GravityParameters):
            module.config = replace(module.config, **stated)


def _base(model: nn.Module) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _message(field: str, expected: str, got: object) -> str:
    return f"SofteningAnnealing.{field}: expected {expected}, got {got!r}"
