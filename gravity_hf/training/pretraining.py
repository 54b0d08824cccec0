"""Training a registered model from scratch, under dot-product attention or gravity."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, TrainingArguments

from ..config import GravityConfig
from ..integration.calibration import calibrate, measure_attention
from ..integration.patching import patch_with_gravity
from .conditions import run_conditions
from .files import write_json
from .optim import GravityTrainer
from .recipe import checkpoints_of, train_resumably
from .streams import ConsecutiveWindows, RandomWindows, TokenStream, collate

ATTENTIONS = ("dot_product", "gravity")
RESULT_FILE = "pretrain.json"
SETTINGS_FILE = "pretrain_settings.json"
_CALIBRATION_BATCHES = 4
_CALIBRATION_ROWS = 8


@dataclass
class PretrainArguments:
    """What is trained, and how its attention works. Sizes are in tokens."""

    architecture: str = field(
        default="qwen2", metadata={"help": "A causal language model's model_type: qwen2, gpt2, ..."}
    )
    overrides: str = field(
        default="",
        metadata={"help": "Its sizes: 'hidden_size=384,num_hidden_layers=6' or a JSON object."},
    )
    attention: str = field(default="gravity", metadata={"help": "gravity or dot_product."})
    law: str = field(default="power", metadata={"help": "Law of gravity: power or force."})
    mass_per: str = field(
        default="query_head", metadata={"help": "One mass per query_head, kv_head or layer."}
    )
    distance: str = field(default="euclidean", metadata={"help": "euclidean or lifted."})
    # This softness and this gravity_scale: scripts/experiments/from_scratch.py tune.
    softness: float = field(
        default=0.25,
        metadata={"help": "Softening at the start, in mean squared lengths of q and k."},
    )
    implementation: str = field(
        default="auto", metadata={"help": "How gravity is computed; see GravityConfig."}
    )
    gravity_scale: float = field(
        default=100.0,
        metadata={"help": "How much faster masses and softenings learn than weights."},
    )
    length: int = field(default=256, metadata={"help": "Tokens in a window."})
    validation_windows: int = field(default=512, metadata={"help": "Windows to validate on."})

    def __post_init__(self) -> None:
        if self.attention not in ATTENTIONS:
            raise ValueError(
                f"--attention: expected one of {list(ATTENTIONS)}, got {self.attention!r}"
            )


class PretrainResult(NamedTuple):
    """The trained model and what to say of it: `record` is JSON-able."""

    model: PreTrainedModel
    record: dict[str, Any]


def new_model(arguments: PretrainArguments, vocabulary: int, seed: int) -> PreTrainedModel:
    """A freshly initialised model, reproducible by `seed`; its attention is still its own.

    Raises:
        ValueError: no such architecture, or an override that it does not have.
    """
    sizes = {"vocab_size": vocabulary, **_overrides(arguments.overrides)}
    try:
        config = AutoConfig.for_model(arguments.architecture)
    except ValueError as error:
        raise ValueError(
            f"--architecture: expected a model_type of transformers, such as qwen2 or gpt2, got "
            f"{arguments.architecture!r}"
        ) from error
    unknown = sorted(name for name in sizes if not hasattr(config, name))
    if unknown:
        raise ValueError(
            f"--overrides: expected settings of {type(config).__name__}, got {unknown}, which it "
            "does not have"
        )
    torch.manual_seed(seed)
    # The default tokens of published models may lie outside a small vocabulary.
    outside = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config = AutoConfig.for_model(arguments.architecture, **{**outside, **sizes})
    return AutoModelForCausalLM.from_config(config)


def start_under_gravity(
    model: PreTrainedModel, arguments: PretrainArguments, windows: RandomWindows
) -> None:
    """Patch a new model and set its masses and softenings from its own queries and keys.

    At random weights as in a trained model the closed form gives every head the temperature of the
    dot product that it replaces; Gravity-2's constants would start the heads near uniform.
    """
    settings = GravityConfig(
        law=arguments.law, mass_per=arguments.mass_per, implementation=arguments.implementation
    )
    patch_with_gravity(model, settings)
    batches = [
        {"input_ids": windows.__getitems__(list(range(start, start + _CALIBRATION_ROWS)))}
        for start in range(0, _CALIBRATION_BATCHES * _CALIBRATION_ROWS, _CALIBRATION_ROWS)
        if start + _CALIBRATION_ROWS <= len(windows)
    ]
    calibrate(model, batches, arguments.softness, arguments.distance, progress=False)


def pretrain(
    arguments: PretrainArguments,
    training: TrainingArguments,
    stream: TokenStream,
) -> PretrainResult:
    """Train from scratch on random windows of `stream`; `max_steps` of `training` sets how long.

    Runs with equal seed, sizes and batches see the same windows in the same order, whatever their
    attention. A run whose checkpoints lie in `output_dir` goes on from the last whole one.

    Args:
        arguments: the model.
        training: transformers' TrainingArguments; `max_steps` must be positive.
        stream: the text.

    Returns:
        The model and a record: losses in nats per token with their steps, conditions, settings.

    Raises:
        ValueError: settings that do not fit, or checkpoints of a run with other settings.
    """
    if training.max_steps <= 0:
        raise ValueError(f"--max_steps: expected a positive number, got {training.max_steps}")
    _claim_folder(arguments, training, stream)
    rows = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    order = training.seed if training.data_seed is None else training.data_seed
    train = RandomWindows(stream.train, training.max_steps * rows, arguments.length, order)
    validation = ConsecutiveWindows(
        stream.validation, arguments.validation_windows, arguments.length
    )
    model = new_model(arguments, stream.vocabulary, training.seed)
    if arguments.attention == "gravity":
        start_under_gravity(model, arguments, train)
    trainer = _WindowTrainer(
        model=model,
        args=training,
        train_dataset=train,
        eval_dataset=validation,
        data_collator=collate,
        processing_class=stream.tokenizer,
        gravity_scale=arguments.gravity_scale,
    )
    started = time.perf_counter()
    train_resumably(trainer)
    seconds = time.perf_counter() - started
    final = trainer.evaluate()["eval_loss"]
    record = _record(arguments, training, stream, model, trainer.state.log_history, final, seconds)
    if arguments.attention == "gravity":
        batch = {"input_ids": validation.__getitems__(list(range(min(8, len(validation)))))}
        report = measure_attention(model, [batch], progress=False)
        record["attention"] = {"summary": report.summary(), "heads": list(report.rows)}
    return PretrainResult(model, record)


class _WindowTrainer(GravityTrainer):
    """The windows are random already: they are read in order, so that a batch depends on the seed
    alone, and a resumed run goes on where it stopped."""

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> torch.utils.data.Sampler:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def write_record(record: dict[str, Any], folder: str | Path) -> Path:
    """Write `pretrain.json` into `folder`, whole or not at all."""
    return write_json(Path(folder, RESULT_FILE), record)


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
        if known != settings:
            raise ValueError(
                f"--output_dir: expected a new folder or one with checkpoints of this very run, "
                f"{str(folder)!r} has checkpoints of a run with other settings. Choose another "
                "folder, or delete them"
            )
    elif training.process_index == 0:
        write_json(file, settings)


def _record(
    arguments: PretrainArguments,
    training: TrainingArguments,
    stream: TokenStream,
    model: PreTrainedModel,
    history: list[dict[str, Any]],
    final: float,
    seconds: float,
) -> dict[str, Any]:
    evaluations = {e["step"]: e["eval_loss"] for e in history if "eval_loss" in e}
    tokens = (
        training.max_steps
        * training.train_batch_size
        * training.gradient_accumulation_steps
        * training.world_size
        * arguments.length
    )
    return {
        "loss": final,
        "best_loss": min([final, *evaluations.values()]),
        "unit": "nats per token of the validation text",
        "evaluations": evaluations,
        "training_losses": {e["step"]: e["loss"] for e in history if "loss" in e},
        "parameters": model.num_parameters(),
        "tokens": tokens,
        "seconds": seconds,
        "seed": training.seed,
        "data_seed": training.data_seed,
        "arguments": dict(vars(arguments)),
        "training": _essential(training),
        "text": {
            "description": stream.description,
            "digest": stream.digest,
            "bytes_per_token": stream.bytes_per_token,
        },
        "conditions": run_conditions(training.device),
    }


def _essential(training: TrainingArguments) -> dict[str, Any]:
    names = ("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps")
    names += ("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps")
    names += ("weight_decay", "adam_beta1", "adam_beta2", "max_grad_norm", "bf16", "torch_compile")
    values = {name: getattr(training, name) for name in names}
    return {**values, "lr_scheduler_type": str(training.lr_scheduler_type.value)}


def _overrides(text: str) -> dict[str, Any]:
    """`"a=1,b=x"` or a JSON object as a dict; numbers and booleans are read as such."""
    text = text.strip()
    if text.startswith("{"):
        return json.loads(text)
    values = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"--overrides: expected name=value, got {part!r}")
        try:
            values[name.strip()] = json.loads(value)
        except ValueError:
            values[name.strip()] = value.strip()
    return values
