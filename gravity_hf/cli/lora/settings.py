"""The settings of a LoRA run: dataclasses that become flags, YAML keys and fingerprints alike."""

from __future__ import annotations

import importlib.util
import math
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from ...training.data_arguments import DataArguments
from ...training.recipe import TrainingOptions
from ..steps.parsing import parse_settings


def _help(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class LoraRunArguments:
    """What is trained, and how."""

    model: str = _help("", "Gravity model (folder or Hub name), or a host to convert on the fly.")
    out: str = _help("", "Folder for the adapter. Its subfolder work holds what is finished.")
    work: str | None = _help(None, "Folder for what is finished. Default: OUT/work.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _help(
        "auto", "Of the weights; auto takes the checkpoint's own."
    )
    device: str = _help("auto", "auto (a GPU where there is one), cpu or cuda.")
    force: bool = _help(False, "Start anew: replace what is in OUT.")
    softness: float | None = _help(
        None, "Convert a host first, with this softness: 0 is bare gravity. Not for gravity models."
    )
    law: Literal["force", "power"] = _help("force", "Law of a host that is converted.")
    samples: int = _help(16, "Pieces of text to calibrate a host on.")
    steps: int = _help(300, "Optimiser steps.")
    rank: int = _help(8, "Rank of the LoRA matrices.")
    alpha: int = _help(16, "LoRA updates are scaled by alpha / rank.")
    dropout: float = _help(0.0, "Dropout on the LoRA input.")
    learning_rate: float = _help(2e-4, "Of the LoRA weights; masses learn 30 times faster.")
    qlora: bool = _help(False, "Load the weights in 4 bits (bitsandbytes); masses stay float32.")


@dataclass
class LoraSettings:
    """Everything together. `check` comes before any work."""

    run: LoraRunArguments = field(default_factory=LoraRunArguments)
    data: DataArguments = field(default_factory=DataArguments)
    training: TrainingOptions = field(default_factory=TrainingOptions)

    def to_dict(self) -> dict[str, Any]:
        """All settings, flat, as the keys of a YAML file."""
        return {key: value for part in asdict(self).values() for key, value in part.items()}

    def check(self) -> None:
        """Raise ValueError or ImportError; changes nothing."""
        run = self.run
        for name in ("model", "out"):
            if not getattr(run, name):
                raise ValueError(f"{name}: expected a value, got none. Give --{name}")
        for name in ("samples", "steps", "rank", "alpha"):
            if getattr(run, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(run, name)}")
        if not math.isfinite(run.learning_rate) or run.learning_rate <= 0:
            raise ValueError(f"learning_rate: expected more than 0, got {run.learning_rate}")
        if run.softness is not None and (not math.isfinite(run.softness) or run.softness < 0):
            raise ValueError(f"softness: expected at least 0, got {run.softness}")
        if run.device.startswith("cuda:"):
            raise ValueError(
                f"device: expected auto, cpu or cuda, got {run.device!r}. Choose a GPU with "
                "CUDA_VISIBLE_DEVICES=..."
            )
        self.training.check()
        if run.qlora and importlib.util.find_spec("bitsandbytes") is None:
            raise ImportError(
                "qlora needs bitsandbytes, which is not installed: pip install bitsandbytes"
            )


def parse_lora(arguments: list[str], **options: Any) -> LoraSettings:
    """The settings from a command line: flags, or a YAML file and flags; see `parse_settings`."""
    kinds = tuple(part.default_factory for part in fields(LoraSettings))
    return LoraSettings(*parse_settings(kinds, arguments, **options))
