"""What training runs share: few settings made into TrainingArguments, and resuming from the last
checkpoint that is whole.

A run that is killed while it writes a checkpoint leaves a folder that Trainer would take for one.
"""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from accelerate import PartialState
from safetensors import SafetensorError, safe_open
from transformers import Trainer, TrainingArguments

# Package that each kind of curves needs, and how to get it.
_REPORTERS = {"tensorboard": "tensorboard", "trackio": "trackio"}
_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
# Steps that only the main process runs may take long; the others wait at most this many seconds.
WAIT_S = 24 * 3600


@dataclass
class TrainingOptions:
    """The part of TrainingArguments that a conversion or a LoRA run needs; see `arguments_of`."""

    batch_size: int = field(default=8, metadata={"help": "Rows per device and forward pass."})
    accumulation: int = field(
        default=1, metadata={"help": "Forward passes that make up one optimiser step."}
    )
    bf16: bool = field(
        default=False, metadata={"help": "Mixed precision with bfloat16 where the device has it."}
    )
    gradient_checkpointing: bool = field(
        default=False, metadata={"help": "Recompute activations: less memory, a third slower."}
    )
    torch_compile: bool = field(default=False, metadata={"help": "Compile the model."})
    warmup: float = field(
        default=0.05, metadata={"help": "Share of the steps in which the learning rate rises."}
    )
    weight_decay: float = field(
        default=0.0, metadata={"help": "Of LoRA weights; never of masses and softenings."}
    )
    save_steps: int = field(
        default=100, metadata={"help": "Optimiser steps between checkpoints to resume from."}
    )
    logging_steps: int = field(
        default=10, metadata={"help": "Optimiser steps between losses; divides save_steps."}
    )
    report_to: Literal["none", "tensorboard", "trackio"] = field(
        default="none", metadata={"help": "Where training curves go."}
    )

    def that_matter(self) -> dict[str, Any]:
        """Without those that change no number: how often something is saved or shown, and where."""
        shown = {"save_steps", "logging_steps", "report_to"}
        return {name: value for name, value in vars(self).items() if name not in shown}

    def check(self) -> None:
        """Raise ValueError or ImportError before any work is done."""
        for name in ("batch_size", "accumulation", "save_steps", "logging_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0.0 <= self.warmup < 1.0:
            raise ValueError(f"warmup: expected a share of at least 0, below 1, got {self.warmup}")
        if self.save_steps % self.logging_steps:
            # A loss is the mean since the last log; a checkpoint between two would split one.
            raise ValueError(
                f"save_steps: expected a multiple of logging_steps ({self.logging_steps}), got "
                f"{self.save_steps}. A resumed run could not report the same losses otherwise"
            )
        package = _REPORTERS.get(self.report_to)
        if package is not None and importlib.util.find_spec(package) is None:
            raise ImportError(
                f"report_to {self.report_to!r} needs {package}, which is not installed: "
                f"pip install {package}"
            )


def arguments_of(
    options: TrainingOptions,
    folder: str | Path,
    *,
    steps: int,
    learning_rate: float,
    seed: int = 0,
    use_cpu: bool = False,
    **others: Any,
) -> TrainingArguments:
    """TrainingArguments for `steps` optimiser steps: AdamW, warmup, cosine to 0, clipped at norm 1.

    Args:
        options: batch, precision, checkpoints, reports.
        folder: where checkpoints go, at most two at a time.
        steps: optimiser steps.
        learning_rate: of the weights; GravityTrainer scales it for masses and softenings.
        seed: of the order of the data and of dropout.
        use_cpu: train on the CPU even where there is a GPU.
        **others: further TrainingArguments; they win over the ones made here.
    """
    values: dict[str, Any] = {
        "max_steps": steps,
        "per_device_train_batch_size": options.batch_size,
        "gradient_accumulation_steps": options.accumulation,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": int(options.warmup * steps),
        "weight_decay": options.weight_decay,
        "max_grad_norm": 1.0,
        "bf16": options.bf16,
        "torch_compile": options.torch_compile,
        "save_strategy": "steps",
        "save_steps": options.save_steps,
        "save_total_limit": 2,
        "logging_steps": options.logging_steps,
        "report_to": [] if options.report_to == "none" else [options.report_to],
        "run_name": Path(folder).name.lstrip("."),
        "seed": seed,
        "data_seed": seed,
        "use_cpu": use_cpu,
        "ddp_find_unused_parameters": False,
        "ddp_timeout": WAIT_S,
        # The runs have bars of their own.
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "label_names": ["labels"],
    }
    if options.gradient_checkpointing:
        values["gradient_checkpointing"] = True
        values["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    return TrainingArguments(str(folder), **{**values, **others})


def train_resumably(trainer: Trainer) -> list[dict[str, float]]:
    """Train to the end, from the last whole checkpoint of the trainer's folder where there is one.

    Checkpoints that were cut off are removed. On the CPU a resumed run ends with the same numbers,
    bit for bit, as one that was never stopped.

    Raises:
        ValueError: checkpoints of a run with another number of processes, or of another optimiser.

    Returns:
        `step`, `loss` (mean since the entry before it) and, where there is one, `grad_norm` (before
        clipping) of everything that was logged, from the first step on.
    """
    folder = Path(trainer.args.output_dir)
    state = PartialState()
    checkpoint = last_whole_checkpoint(folder, state.num_processes)
    _refuse_other_processes(folder, checkpoint, state.num_processes)
    state.wait_for_everyone()
    if state.is_main_process:
        for other in checkpoints_of(folder):
            if checkpoint is None or _step_of(other) > _step_of(checkpoint):
                shutil.rmtree(other)
    state.wait_for_everyone()
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    return [
        {name: entry[name] for name in ("step", "loss", "grad_norm") if name in entry}
        for entry in trainer.state.log_history
        if "loss" in entry
    ]


def _refuse_other_processes(folder: Path, checkpoint: Path | None, processes: int) -> None:
    """What more or fewer processes have left is whole for them: nothing to be cleared away."""
    for other in reversed(checkpoints_of(folder)):
        if checkpoint is not None and _step_of(other) <= _step_of(checkpoint):
            return
        # One process names its file without a number.
        written = len(list(other.glob("rng_state_*.pth"))) or 1
        if written != processes and is_whole_checkpoint(other, written):
            raise ValueError(
                f"{other}: expected a checkpoint of {processes} process(es), as this run has, got "
                f"one of {written}. Run it with {written} again, or choose another folder"
            )


def last_whole_checkpoint(folder: Path, processes: int = 1) -> Path | None:
    """The newest checkpoint under `folder` with every file present and readable; None without one.

    Args:
        folder: a trainer's output folder; need not exist.
        processes: each of them has a file with the state of its random numbers.
    """
    whole = (c for c in reversed(checkpoints_of(folder)) if is_whole_checkpoint(c, processes))
    return next(whole, None)


def checkpoints_of(folder: Path) -> list[Path]:
    """Checkpoint folders, whole or not, oldest first."""
    found = (p for p in folder.glob("checkpoint-*") if _CHECKPOINT.fullmatch(p.name))
    return sorted(found, key=_step_of)


def is_whole_checkpoint(folder: Path, processes: int = 1) -> bool:
    """Whether Trainer finished writing the checkpoint in `folder`, as far as its files can tell.

    A file that was cut off is noticed: safetensors says how long it is, a zip archive (what torch
    writes) ends with its table of contents, JSON does not parse.
    """
    if not _is_json(folder / "trainer_state.json") or not _is_archive(folder / "scheduler.pt"):
        return False
    names = (
        ["rng_state.pth"] if processes == 1 else [f"rng_state_{i}.pth" for i in range(processes)]
    )
    return (
        all(_is_archive(folder / n) for n in names)
        and _has_model(folder)
        and _has_optimizer(folder)
    )


def _has_model(folder: Path) -> bool:
    adapter = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    if any(file.exists() for file in adapter):
        return _is_json(adapter[0]) and _is_tensors(adapter[1])
    index = folder / "model.safetensors.index.json"
    if index.exists():
        if not _is_json(index):
            return False
        shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return all(_is_tensors(folder / shard) for shard in shards)
    files = list(folder.glob("*.safetensors"))
    return (bool(files) and all(map(_is_tensors, files))) or _has_shards(folder, "*model*")


def _has_optimizer(folder: Path) -> bool:
    # torch's own layout has one file, in archives like those of one process; FSDP has a folder.
    names = ("optimizer.pt", "optimizer.bin")
    return any(_is_archive(folder / n) for n in names) or _has_shards(folder, "optimizer*")


def _has_shards(folder: Path, pattern: str) -> bool:
    """torch.distributed.checkpoint writes `.metadata` when every process has written its part."""
    return any((part / ".metadata").is_file() for part in folder.glob(pattern) if part.is_dir())


def _is_json(file: Path) -> bool:
    try:
        return isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError):
        return False


def _is_archive(file: Path) -> bool:
    return file.is_file() and zipfile.is_zipfile(file)


def _is_tensors(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return True
    except (OSError, SafetensorError):
        return False


def _step_of(checkpoint: Path) -> int:
    match = _CHECKPOINT.fullmatch(checkpoint.name)
    return int(match.group(1)) if match else -1
