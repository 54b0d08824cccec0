"""Training a model from scratch: hosts under dot-product attention or gravity, and our own."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from ..integration.calibration import measure_attention
from ..integration.own_models import is_own_model
from .conditions import run_conditions
from .files import write_json
from .governed.governed_training import GovernedTraining, read_settings
from .kept_models import LAST, KeepModels
from .new_models import new_model, start_under_gravity
from .optim import OWN_GRAVITY_SCALE
from .pretrain_arguments import ATTENTIONS, PretrainArguments
from .projector import ProjectCoordinates
from .recipe import checkpoints_of, train_resumably
from .repulsion import RepulsionTrainer
from .streams import ConsecutiveWindows, RandomWindows, TokenStream, collate

__all__ = [
    "ATTENTIONS",
    "RESULT_FILE",
    "PretrainArguments",
    "PretrainResult",
    "new_model",
    "pretrain",
    "start_under_gravity",
    "write_record",
]

RESULT_FILE = "pretrain.json"
SETTINGS_FILE = "pretrain_settings.json"
AUDIT_FILE = "governed.jsonl"
# Of hosts, by scripts/experiments/from_scratch.py tune: more than a conversion's, as masses start
# where nothing has been learnt yet.
_HOST_GRAVITY_SCALE = 100.0


class PretrainResult(NamedTuple):
    """The trained model and what to say of it: `record` is JSON-able."""

    model: PreTrainedModel
    record: dict[str, Any]


def pretrain(
    arguments: PretrainArguments,
    training: TrainingArguments,
    stream: TokenStream,
    callbacks: Sequence[TrainerCallback] = (),
) -> PretrainResult:
    """Train from scratch on random windows of `stream`; `max_steps` of `training` sets how long.

    Runs with equal seed, sizes and batches see the same windows in the same order, whatever their
    model, and whatever else draws random numbers. A run whose checkpoints lie in `output_dir` goes
    on from the last whole one. Where `training` saves checkpoints, `output_dir` also gets the
    folders `best` (lowest validation loss) and `last`; see `KeepModels`.

    Args:
        arguments: the model.
        training: transformers' TrainingArguments; `max_steps` must be positive.
        stream: the text.
        callbacks: transformers' TrainerCallbacks, in place of the one that prints losses.

    Returns:
        The model as it was last, and a record: losses in nats per token with their steps,
        conditions, settings.

    Raises:
        ValueError: settings that do not fit, or checkpoints of a run with other settings.
    """
    if training.max_steps <= 0:
        raise ValueError(f"--max_steps: expected a positive number, got {training.max_steps}")
    arguments = _with_content(arguments)
    rows = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    order = training.seed if training.data_seed is None else training.data_seed
    train = RandomWindows(stream.train, training.max_steps * rows, arguments.length, order)
    validation = ConsecutiveWindows(
        stream.validation, arguments.validation_windows, arguments.length
    )
    model = new_model(arguments, stream.vocabulary, training.seed)
    is_own = is_own_model(model)
    is_patched = arguments.attention == "gravity" and not is_own
    if is_patched:
        start_under_gravity(model, arguments, train)
    usual = OWN_GRAVITY_SCALE if is_own else _HOST_GRAVITY_SCALE
    gravity_scale = usual if arguments.gravity_scale is None else arguments.gravity_scale
    governed = _governed(arguments, training)
    trainer = _PretrainTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collate,
        processing_class=stream.tokenizer,
        gravity_scale=gravity_scale,
        repulsion_weight=arguments.repulsion_weight,
        repulsion_interval=arguments.repulsion_interval,
        detach_masses=arguments.detach_masses,
        callbacks=[*callbacks, *([] if governed is None else [governed.callback()])],
        optimizers=(
            (None, None)
            if governed is None
            else governed.optimizers(model, training, gravity_scale)
        ),
    )
    if callbacks:
        trainer.remove_callback(PrinterCallback)
    keeper = KeepModels(trainer) if training.save_strategy != "no" else None
    if keeper is not None:
        trainer.add_callback(keeper)
    if arguments.projector_interval:
        trainer.add_callback(ProjectCoordinates(trainer, validation, arguments.projector_interval))
    _claim_folder(arguments, training, stream)
    started = time.perf_counter()
    train_resumably(trainer)
    seconds = time.perf_counter() - started
    final = _final_loss(trainer)
    if keeper is not None:
        keeper.keep(LAST, final)
    record = _record(arguments, training, stream, trainer, final, seconds)
    if governed is not None:
        record["governance"] = governed.report()
    if is_patched:
        batch = {"input_ids": validation.__getitems__(list(range(min(8, len(validation)))))}
        report = measure_attention(model, [batch], progress=False)
        record["attention"] = {"summary": report.summary(), "heads": list(report.rows)}
    return PretrainResult(model, record)


def _with_content(arguments: PretrainArguments) -> PretrainArguments:
    """With settings of governed training in place of the name of their file, which may change."""
    content = read_settings(arguments.governed_settings)
    text = json.dumps(content, sort_keys=True) if content else ""
    return dataclasses.replace(arguments, governed_settings=text)


def _governed(arguments: PretrainArguments, training: TrainingArguments) -> GovernedTraining | None:
    """As `arguments` say; with a ledger in the folder of the run unless they say otherwise."""
    if not arguments.governed:
        return None
    content = read_settings(arguments.governed_settings)
    content.setdefault("audit", {"path": str(Path(training.output_dir, AUDIT_FILE))})
    return GovernedTraining.from_dict(content)


class _PretrainTrainer(RepulsionTrainer):
    """The windows are random already: they are read in order, so that a batch depends on the seed
    alone, and a resumed run goes on where it stopped."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        # For curves only: on the screen they would hide the loss.
        if "loss" in logs and self.args.report_to:
            logs.update(_statistics(self.model))
        super().log(logs, *args, **kwargs)


def _statistics(model: nn.Module) -> dict[str, float]:
    """What an NGT says of its heads, `ngt/...`; nothing of other models."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) != "ngt" or config.attention != "gravity":
        return {}
    # Imported here because other models do not need it.
    from ..models.ngt.statistics import parameter_statistics

    return parameter_statistics(model)


def write_record(record: dict[str, Any], folder: str | Path) -> Path:
    """Write `pretrain.json` into `folder`, whole or not at all."""
    return write_json(Path(folder, RESULT_FILE), record)


def _final_loss(trainer: RepulsionTrainer) -> float:
    """The validation loss of the last step, measured unless it has been."""
    for entry in reversed(trainer.state.log_history):
        if "eval_loss" in entry and entry["step"] == trainer.state.global_step:
            return entry["eval_loss"]
    return trainer.evaluate()["eval_loss"]


def _claim_folder(
    arguments: PretrainArguments, training: TrainingArguments, stream: TokenStream
) -> None:
    """Checkpoints of another run must not be taken for this one's."""
    folder = Path(training.output_dir)
    settings = {
        "arguments": dict(vars(arguments)),
        "training": _essential(training),
        "seeds": [training.seed, training.data_seed],
        "text": stream.digest,
    }
    file = folder / SETTINGS_FILE
    if checkpoints_of(folder):
        known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else None
        if known is not None:
            # A run from before there was a setting has had its default.
            defaults = {one.name: one.default for one in dataclasses.fields(arguments)}
            known["arguments"] = defaults | known.get("arguments", {})
        if known != settings:
            raise ValueError(
                f"--output_dir: expected a new folder or one with checkpoints of this very run, "
                f"{str(folder)!r} has checkpoints of a run with other settings"
                f"{_differences(known, settings)}. Choose another folder, or delete them"
            )
    elif training.process_index == 0:
        write_json(file, settings)


def _differences(known: dict[str, Any] | None, wanted: dict[str, Any]) -> str:
    """` (law: power, now force)`, of the settings that differ."""
    if known is None:
        return ""
    parts = []
    for group in ("arguments", "training"):
        before, now = known.get(group, {}), wanted[group]
        parts += [
            f"{name}: {before.get(name)!r}, now {now.get(name)!r}"
            for name in sorted(before.keys() | now.keys())
            if before.get(name) != now.get(name)
        ]
    parts += [f"{name} differs" for name in ("seeds", "text") if known.get(name) != wanted[name]]
    return f" ({'; '.join(parts)})"


def _record(
    arguments: PretrainArguments,
    training: TrainingArguments,
    stream: TokenStream,
    trainer: RepulsionTrainer,
    final: float,
    seconds: float,
) -> dict[str, Any]:
    history = trainer.state.log_history
    evaluations = {e["step"]: e["eval_loss"] for e in history if "eval_loss" in e}
    losses = {**evaluations, training.max_steps: final}
    best_step = min(losses, key=lambda step: losses[step])
    tokens = (
        training.max_steps
        * training.train_batch_size
        * training.gradient_accumulation_steps
        * training.world_size
        * arguments.length
    )
    return {
        "loss": final,
        "best_loss": losses[best_step],
        "best_step": best_step,
        "unit": "nats per token of the validation text",
        "evaluations": evaluations,
        "training_losses": {e["step"]: e["loss"] for e in history if "loss" in e},
        "learning_rates": {e["step"]: e["learning_rate"] for e in history if "loss" in e},
        "parameters": trainer.model.num_parameters(),
        "tokens": tokens,
        "seconds": seconds,
        "seed": training.seed,
        "data_seed": training.data_seed,
        "arguments": {**vars(arguments), "gravity_scale": trainer.gravity_scale},
        "training": _essential(training),
        "text": {
            "description": stream.description,
            "digest": stream.digest,
            "bytes_per_token": stream.bytes_per_token,
        },
        "conditions": run_conditions(training.device),
    }


def _essential(training: TrainingArguments) -> dict[str, Any]:
    names = (
        *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
        *("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
        *("weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm"),
        *("bf16", "fp16", "torch_compile"),
    )
    values = {name: getattr(training, name) for name in names}
    return {**values, "lr_scheduler_type": str(training.lr_scheduler_type.value)}
