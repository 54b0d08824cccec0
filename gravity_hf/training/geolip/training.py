"""One training, whatever its rows are: the Trainer, the verdict, and the folder it leaves."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState
from safetensors.torch import save_file
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ... import __version__
from ...models.geolip import GeolipConfig, GeolipForReconstruction
from ...models.geolip.collating import GeolipCollator
from ...models.geolip.companion_hosts import is_causal_host
from ...models.geolip.feature_statistics import FeatureStatistics
from ...models.geolip.verdict import Verdict, compute_verdict
from ..conditions import run_conditions
from ..files import write_json
from ..recipe import TrainingOptions, arguments_of, train_resumably
from .folder import RESULTS_FILE, SAMPLES_FILE, publish
from .held_out import HeldOut, batches_in_order, few_of, samples_of
from .history import DeviationHistory
from .records import evaluations_of, training_of, without_places
from .settings import GeolipSettings
from .trainer import GeolipTrainer

__all__ = ["Companion", "GeolipResult", "TrainingData", "train"]

# Whose frames are watched over the training.
_WATCHED_TOKENS = 256
_DONE = "done"


class GeolipResult(NamedTuple):
    """The trained model, what was measured of it, and what to say of the run: JSON-able."""

    model: GeolipForReconstruction
    verdict: Verdict
    record: dict[str, Any]


class Companion(NamedTuple):
    """A host, its tokenizer, and which of its layers the model has learned."""

    host: PreTrainedModel
    tokenizer: Any
    layer: int

    def save(self, model: GeolipForReconstruction, folder: Path) -> None:
        """Both as one model, a GeolipCompanion, which names the host; its tokenizer beside it."""
        from ...models.geolip.modeling_companion import GeolipCompanion

        companion = GeolipCompanion.from_host(
            self.host,
            model,
            tokenizer=self.tokenizer,
            read_layer=self.layer,
            causal=is_causal_host(self.host),
        )
        companion.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


@dataclass(frozen=True, eq=False)
class TrainingData:
    """What is trained on, what is measured on, and what a record says of it.

    Attributes:
        train, held_out: data sets of rows for GeolipCollator.
        task: `"features"` or `"images"`.
        description: one line.
        facts: more about them, JSON-able.
        statistics: of features; None where they stay as they are.
        processor: of images.
        companion: what the model is saved beside.
    """

    train: Any
    held_out: Any
    task: str
    description: str
    facts: dict[str, Any] = field(default_factory=dict)
    statistics: FeatureStatistics | None = None
    processor: Any = None
    companion: Companion | None = None


def train(
    settings: GeolipSettings,
    config: GeolipConfig,
    data: TrainingData,
    work: Path,
    callbacks: Sequence[TrainerCallback] = (),
) -> GeolipResult:
    """Train a new model on `data` and measure it on what was held out.

    Args:
        settings: how.
        config: of the model, which is initialised by torch's own random numbers.
        data: what.
        work: room for checkpoints; `settings.out` gets the model.
        callbacks: further ones of transformers.
    """
    model = GeolipForReconstruction(config)
    if data.statistics is not None:
        found = data.statistics
        model.set_feature_statistics(found.mean, found.std, found.whitening)
    held_out = HeldOut(model, data.held_out, settings.denoise, settings.seed)
    steps = _steps(settings, len(data.train))
    arguments = _arguments(settings, work, steps)
    deviations = DeviationHistory(GeolipCollator()(few_of(held_out, _WATCHED_TOKENS)))
    trainer = GeolipTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=held_out,
        denoise=settings.denoise,
        callbacks=[deviations, *callbacks],
    )
    trainer.remove_callback(PrinterCallback)
    started = time.perf_counter()
    losses = train_resumably(trainer)
    seconds = time.perf_counter() - started
    verdict = compute_verdict(
        model,
        batches_in_order(held_out, settings.batch_size),
        steps=steps,
        seed=settings.seed,
        progress=settings.progress and trainer.is_world_process_zero(),
    )
    model.config.verdict = verdict.to_dict()
    record = {
        "model_type": config.model_type if data.companion is None else "geolip_companion",
        "gravity_hf": __version__,
        "training": training_of(settings, data, steps, arguments.world_size, seconds),
        "history": {
            "losses": losses,
            "evaluations": evaluations_of(trainer.state.log_history),
            "alphas": trainer.alpha_history.summary(),
            "deviations": deviations.summary(),
        },
        "verdict": verdict.to_dict(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "conditions": run_conditions(arguments.device),
        "settings": without_places(settings.to_dict()),
    }
    if settings.out is not None and trainer.is_world_process_zero():
        _keep(trainer, deviations, data, record, work)
        publish(work / _DONE, work, Path(settings.out))
    return GeolipResult(model, verdict, record)


def _keep(
    trainer: GeolipTrainer,
    deviations: DeviationHistory,
    data: TrainingData,
    record: dict[str, Any],
    work: Path,
) -> None:
    """Into a folder of its own, from which whole files are moved."""
    room = work / _DONE
    room.mkdir(exist_ok=True)
    if data.companion is not None:
        data.companion.save(trainer.model, room)
    else:
        trainer.model.save_pretrained(room)
    if data.processor is not None:
        data.processor.save_pretrained(room)
    trainer.alpha_history.save(room)
    deviations.save(room)
    save_file(samples_of(trainer.eval_dataset), room / SAMPLES_FILE)
    write_json(room / RESULTS_FILE, record)


def _steps(settings: GeolipSettings, rows: int) -> int:
    if settings.epochs is None:
        return settings.steps
    return settings.epochs * math.ceil(rows / settings.batch_size / PartialState().num_processes)


def _arguments(settings: GeolipSettings, work: Path, steps: int) -> TrainingArguments:
    options = TrainingOptions(
        batch_size=settings.batch_size,
        bf16=settings.bf16,
        save_steps=settings.save_steps,
        logging_steps=settings.logging_steps,
        report_to=settings.report_to,  # type: ignore[arg-type]
    )
    return arguments_of(
        options,
        work,
        steps=steps,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        use_cpu=settings.device == "cpu",
        warmup_steps=min(settings.warmup_steps, steps - 1),
        eval_strategy="steps",
        eval_steps=settings.eval_steps,
        per_device_eval_batch_size=settings.batch_size,
        disable_tqdm=not (settings.progress and sys.stderr.isatty()),
        dataloader_pin_memory=torch.accelerator.is_available() and settings.device != "cpu",
        save_strategy="no" if settings.out is None else "steps",
        logging_nan_inf_filter=False,
    )
