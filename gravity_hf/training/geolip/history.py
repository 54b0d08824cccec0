"""What a geolip went through in training: its alphas, mode by mode, and how far its frames are
from uniform. Both are measured where the Trainer logs, and go on where a run is resumed."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from ...models.geolip.frames import critical_deviation, frame_deviation
from ..callback_state import base_model, restore
from ..files import write_json

__all__ = [
    "ALPHAS_FILE",
    "DEVIATIONS_FILE",
    "AlphaHistory",
    "DeviationHistory",
    "TrainingHistory",
    "deviations",
    "geolip_in",
]

ALPHAS_FILE = "alphas.safetensors"
DEVIATIONS_FILE = "deviations.json"


class TrainingHistory(TrainerCallback, ExportableState):
    """Entries by step: one at the start, one at each log, one at the end.

    Attributes:
        steps: optimiser steps that were done at each entry.
        entries: what was measured, JSON-able.
    """

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.entries: list[Any] = []

    def state(self) -> dict[str, Any]:
        """Progress, JSON-able; transformers stores it in checkpoints."""
        return {"args": {}, "attributes": {"steps": self.steps, "entries": self.entries}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not restore(self, state):
            self.steps, self.entries = [], []
        self._enter(state, kwargs["model"])

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The callback that decides about it comes first.
        if control.should_log:
            self._enter(state, kwargs["model"])

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._enter(state, kwargs["model"])

    def scalars(self) -> dict[str, float]:
        """The last entry for curves; empty before the first."""
        raise NotImplementedError

    def measure(self, model: Any) -> Any:
        """The entry for a geolip as it is, JSON-able."""
        raise NotImplementedError

    def _enter(self, state: TrainerState, model: nn.Module) -> None:
        if self.steps and self.steps[-1] == state.global_step:
            return
        self.steps.append(state.global_step)
        self.entries.append(self.measure(geolip_in(model)))


class AlphaHistory(TrainingHistory):
    """Every alpha, `[L, D]`, over training: how far each layer lets attention move each mode."""

    def measure(self, model: Any) -> list[list[float]]:
        return model.alphas().tolist()

    def tensors(self) -> dict[str, Tensor]:
        """`steps` `[T]` int64 and `alphas` `[T, L, D]` float32."""
        return {
            "steps": torch.tensor(self.steps, dtype=torch.int64),
            "alphas": torch.tensor(self.entries, dtype=torch.float32),
        }

    def save(self, folder: Path) -> Path:
        """Write `alphas.safetensors` into `folder`, whole or not at all. The file."""
        file = folder / ALPHAS_FILE
        unfinished = folder / f".{ALPHAS_FILE}.tmp"
        save_file({name: t.contiguous() for name, t in self.tensors().items()}, unfinished)
        unfinished.replace(file)
        return file

    def summary(self) -> dict[str, list[float]]:
        """Steps with mean, smallest and largest alpha, JSON-able; empty lists without layers."""
        alphas = self.tensors()["alphas"]
        if alphas.numel() == 0:
            return {"steps": [], "mean": [], "min": [], "max": []}
        flat = alphas.flatten(1)
        return {
            "steps": list(self.steps),
            "mean": flat.mean(1).tolist(),
            "min": flat.amin(1).tolist(),
            "max": flat.amax(1).tolist(),
        }

    def scalars(self) -> dict[str, float]:
        last = torch.tensor(self.entries[-1] if self.entries else [])
        if last.numel() == 0:
            return {}
        return {"mean_alpha": float(last.mean()), "max_alpha": float(last.max())}


class DeviationHistory(TrainingHistory):
    """Deviation of the frames of the same tokens over training; see `frames.frame_deviation`.

    An entry has the mean over tokens, the largest absolute value, and the share of tokens inside
    the envelope.

    Args:
        batch: collated, of any size: what is looked at.
    """

    def __init__(self, batch: Mapping[str, Any]) -> None:
        super().__init__()
        self.batch = dict(batch)

    def measure(self, model: Any) -> dict[str, float]:
        deviation = deviations(model, self.batch)
        config = model.config
        critical = critical_deviation(config.base_dim, config.envelope_coeff)
        return {
            "mean": float(deviation.mean()),
            "absmax": float(deviation.abs().max()),
            "inside": float((deviation.abs() < critical).double().mean()),
        }

    def save(self, folder: Path) -> Path:
        """Write `deviations.json` into `folder`. The file."""
        return write_json(folder / DEVIATIONS_FILE, self.summary())

    def summary(self) -> dict[str, list[float]]:
        """Steps with `mean`, `absmax` and `inside`, JSON-able."""
        names = ("mean", "absmax", "inside")
        return {
            "steps": list(self.steps),
            **{name: [entry[name] for entry in self.entries] for name in names},
        }

    def scalars(self) -> dict[str, float]:
        last = self.entries[-1] if self.entries else {}
        return {f"frame_deviation_{name}": value for name, value in last.items()}


@torch.no_grad()
def deviations(model: Any, batch: Mapping[str, Any]) -> Tensor:
    """Deviation of every valid token's frame in a collated batch, `[tokens]` float64."""
    device = model.device
    patches = batch.get("patches")
    if patches is None:
        patches = model.patchify(batch["pixel_values"].to(device))
    frame = model.encode(patches.to(device))
    found = frame_deviation(frame, baseline=model.config.deviation_baseline)
    mask = batch.get("attention_mask")
    return found.flatten() if mask is None else found[mask.to(device).bool()]


def geolip_in(model: nn.Module) -> Any:
    """The geolip under the wrappers of distributed training, or `model`."""
    return base_model(getattr(model, "module", model))
