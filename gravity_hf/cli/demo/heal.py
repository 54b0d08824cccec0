"""Three conversions of one host, and the same short LoRA heal for each of them and for the host."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

from ...config import GravityConfig
from ...integration.calibration import calibrate
from ...integration.calibration_report import CalibrationReport
from ...integration.patching import patch_with_gravity
from ...training.corpus import Corpus, even_windows, random_windows
from ...training.lora import gravity_lora, host_lora
from ...training.measures import mean_loss
from ...training.optim import gravity_param_groups
from ...viz.masses import masses_by_layer
from ..console import progress_bar
from .host import cosine_schedule, recent, train_step
from .settings import DemoSettings

CONTROL = "host"
PUBLISHED = "gravity2"
CLOSED_FORM = "closed_form"
CALIBRATED = "calibrated"

TITLES = {
    CONTROL: "dot product (the host)",
    PUBLISHED: "gravity, Gravity-2's constants",
    CLOSED_FORM: "gravity, closed-form masses",
    CALIBRATED: "gravity, calibrated",
}
CONSTANTS = {
    CONTROL: "none: the control",
    PUBLISHED: "M = 0.97, ε = 0.1 everywhere",
    CLOSED_FORM: "M per head, ε = 0.1",
    CALIBRATED: "M and ε per head, lifted keys",
}

_EVALUATION_BATCH = 16


@dataclass
class Outcome:
    """One row of the table. Losses in nats per byte on the fixed validation windows."""

    key: str
    converted: float
    healed: float
    losses: list[float]
    masses_before: list[list[float]] | None = None
    masses_after: list[list[float]] | None = None
    report: CalibrationReport | None = field(default=None, repr=False)

    @property
    def summary(self) -> dict[str, Any]:
        """Softness, contrast and KL; empty where nothing was calibrated."""
        return {} if self.report is None else self.report.summary()


class Laboratory:
    """Holds what every row shares: the host's weights, the data, the budget."""

    def __init__(
        self, host: nn.Module, corpus: Corpus, settings: DemoSettings, console: Console
    ) -> None:
        self.host, self.corpus, self.settings, self.console = host, corpus, settings, console
        self.validation = even_windows(
            corpus.validation, settings.validation_windows, settings.length
        ).split(_EVALUATION_BATCH)
        generator = torch.Generator().manual_seed(settings.seed + 1)
        self.calibration: list[dict[str, Tensor]] = [
            {"input_ids": ids}
            for ids in random_windows(
                corpus.train, settings.calibration_windows, settings.length, generator
            ).split(4)
        ]

    def run(self, key: str) -> tuple[Outcome, nn.Module]:
        """Convert a copy of the host the way `key` names, measure, heal, measure again."""
        model = copy.deepcopy(self.host)
        report = _CONVERSIONS[key](model, self)
        before = masses_by_layer(model) or None
        converted = mean_loss(model, self.validation)
        model, losses = self._heal(key, model)
        outcome = Outcome(
            key=key,
            converted=converted,
            healed=mean_loss(model, self.validation),
            losses=losses,
            masses_before=before,
            masses_after=masses_by_layer(model) or None,
            report=report,
        )
        return outcome, model

    def _heal(self, key: str, model: nn.Module) -> tuple[nn.Module, list[float]]:
        """Same batches, steps, rank and learning rate for every row; LoRA merged at the end."""
        settings = self.settings
        torch.manual_seed(settings.seed)
        adapted = (
            host_lora(model, r=settings.rank, alpha=settings.alpha)
            if key == CONTROL
            else gravity_lora(model, r=settings.rank, alpha=settings.alpha)
        )
        optimizer = torch.optim.AdamW(
            gravity_param_groups(adapted, settings.heal_learning_rate), betas=(0.9, 0.95)
        )
        schedule = cosine_schedule(optimizer, settings.heal_steps)
        generator = torch.Generator().manual_seed(settings.seed + 2)
        losses: list[float] = []
        adapted.train()
        with progress_bar(self.console, f"Healing {TITLES[key]}", settings.heal_steps) as advance:
            for _ in range(settings.heal_steps):
                ids = random_windows(
                    self.corpus.train, settings.heal_batch, settings.length, generator
                )
                losses.append(train_step(adapted, ids, optimizer, schedule))
                advance(f"loss {recent(losses, 10):.3f}")
        return adapted.merge_and_unload().eval(), losses


def _keep(model: nn.Module, laboratory: Laboratory) -> None:
    return None


def _published(model: nn.Module, laboratory: Laboratory) -> None:
    patch_with_gravity(model, GravityConfig())


def _closed_form(model: nn.Module, laboratory: Laboratory) -> CalibrationReport:
    patch_with_gravity(model, GravityConfig())
    return calibrate(
        model, laboratory.calibration, softness=0.0, distance="euclidean", progress=False
    )


def _calibrated(model: nn.Module, laboratory: Laboratory) -> CalibrationReport:
    patch_with_gravity(model, GravityConfig())
    softness = laboratory.settings.softness
    return calibrate(model, laboratory.calibration, softness=softness, progress=False)


_CONVERSIONS: dict[str, Callable[[nn.Module, Laboratory], CalibrationReport | None]] = {
    CONTROL: _keep,
    PUBLISHED: _published,
    CLOSED_FORM: _closed_form,
    CALIBRATED: _calibrated,
}
