"""The steps that train: attention transfer, LoRA, and the control."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import Trainer, TrainerCallback, TrainingArguments

from ...hub.file_names import CALIBRATION_FILE
from ...training.annealing import SofteningAnnealing
from ...training.distributed import save_whole
from ...training.lora import gravity_lora, host_lora
from ...training.optim import GravityTrainer
from ...training.transfer import TransferSettings, TransferTrainer, train_only_gravity
from ..steps.states import save_gravity_state
from ..steps.train import train_with_bar, training_arguments
from .context import Context

_ANNEALING_SHARE = 0.6


def transfer(context: Context, folder: Path) -> dict[str, Any]:
    """Train masses and softenings, nothing else, until attention answers as the host's does."""
    settings = context.settings.transfer
    model = context.gravity_at("calibrate")
    objective = TransferSettings(
        mode=settings.transfer_mode,
        outputs=settings.transfer_outputs,
        weights=settings.transfer_weights,
        logits=settings.transfer_logits,
    )
    arguments = _arguments(
        context, folder, settings.transfer_steps, settings.transfer_learning_rate
    )
    with train_only_gravity(model):
        trainer = TransferTrainer(model=model, transfer=objective, **_inputs(context, arguments))
        losses = train_with_bar(context, trainer, "Attention transfer")
        save_gravity_state(
            trainer.accelerator.unwrap_model(trainer.model), folder, write=context.is_main
        )
    return {"losses": losses, "objective": asdict(objective)}


def lora(context: Context, folder: Path) -> dict[str, Any]:
    """LoRA on the attention projections; masses and softenings train with it."""
    settings = context.settings.lora
    base = context.gravity_at("transfer")
    model = gravity_lora(base, **_rank(context))
    arguments = _arguments(context, folder, settings.lora_steps, settings.lora_learning_rate)
    objective = _objective(context)
    callbacks: list[TrainerCallback] = []
    if settings.anneal_to is not None:
        callbacks.append(_annealing(context))
    inputs = _inputs(context, arguments, callbacks)
    if objective is None:
        trainer: Trainer = GravityTrainer(model=model, **inputs)
    else:
        trainer = TransferTrainer(model=model, transfer=objective, **inputs)
    losses = train_with_bar(context, trainer, "LoRA under gravity")
    save_whole(trainer.accelerator.unwrap_model(trainer.model), folder)
    return {"losses": losses, "objective": None if objective is None else asdict(objective)}


def control(context: Context, folder: Path) -> dict[str, Any]:
    """The same LoRA on the host with its own attention: same data, order, steps and rank."""
    settings = context.settings.lora
    if not context.writes:
        return {"left_out": "an encoder has no text of its own to predict"}
    model = host_lora(context.host(), **_rank(context))
    arguments = _arguments(context, folder, settings.lora_steps, settings.lora_learning_rate)
    trainer = GravityTrainer(model=model, **_inputs(context, arguments))
    losses = train_with_bar(context, trainer, "The same LoRA on the host")
    save_whole(trainer.accelerator.unwrap_model(trainer.model), folder)
    return {"losses": losses}


def controlled(context: Context) -> PeftModel:
    """The host under the control's adapter."""
    return PeftModel.from_pretrained(context.host(), str(context.work.folder("control"))).eval()


def _objective(context: Context) -> TransferSettings | None:
    """None is the text alone. An encoder, which predicts none, learns to answer as its host."""
    settings = context.settings.lora
    if not context.writes:
        return TransferSettings(mode="end_to_end", outputs=1.0, states=1.0)
    if not settings.distillation:
        return None
    return TransferSettings(
        mode="end_to_end",
        outputs=0.0,
        logits=settings.distillation,
        loss=1.0,
        temperature=settings.temperature,
    )


def _annealing(context: Context) -> TrainerCallback:
    """Down to `anneal_to` in the first part of the steps; the rest heals what that cost."""
    settings = context.settings.lora
    file = context.work.folder("calibrate") / CALIBRATION_FILE
    distances: dict[str, list[float]] = {}
    for row in json.loads(file.read_text(encoding="utf-8"))["rows"]:
        distances.setdefault(row["layer"], []).append(row["mean_distance"])
    return SofteningAnnealing(
        max(1, int(_ANNEALING_SHARE * settings.lora_steps)),
        softness=settings.anneal_to,
        distances=distances,
    )


def _rank(context: Context) -> dict[str, Any]:
    settings = context.settings.lora
    return {
        "r": settings.lora_rank,
        "alpha": settings.lora_alpha,
        "dropout": settings.lora_dropout,
    }


def _arguments(
    context: Context, folder: Path, steps: int, learning_rate: float
) -> TrainingArguments:
    return training_arguments(context, context.settings.training, folder, steps, learning_rate)


def _inputs(
    context: Context, arguments: TrainingArguments, callbacks: list[TrainerCallback] | None = None
) -> dict[str, Any]:
    # The first process of a machine fills the cache of datasets, the others read it.
    with context.processes.local_main_process_first():
        data = context.data
    return {
        "args": arguments,
        "train_dataset": data.train,
        "data_collator": data.collator,
        "callbacks": callbacks,
    }
