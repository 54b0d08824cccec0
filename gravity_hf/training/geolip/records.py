"""What a training says of itself: JSON-able, and without places on this machine."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .settings import GeolipSettings

if TYPE_CHECKING:
    from .training import TrainingData

__all__ = ["evaluations_of", "training_of", "without_places"]


def training_of(
    settings: GeolipSettings, data: TrainingData, steps: int, processes: int, seconds: float
) -> dict[str, Any]:
    """What was trained on what, and for how long."""
    names = ("batch_size", "learning_rate", "denoise", "held_out", "seed", "bf16", "preset")
    return {
        "task": data.task,
        "data": data.description,
        **data.facts,
        "rows": len(data.train),
        "held_out_rows": len(data.held_out),
        "steps": steps,
        "processes": processes,
        "warmup_steps": min(settings.warmup_steps, steps - 1),
        "schedule": "cosine",
        "optimizer": "Adam, no decay, gradients clipped at 1",
        **{name: getattr(settings, name) for name in names},
        "seconds": seconds,
    }


def without_places(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without those that name places on this machine; of files and folders their names."""
    kept = {n: value for n, value in settings.items() if n not in ("out", "cache", "host")}
    if "text_files" in kept:
        kept["text_files"] = [Path(file).name for file in kept["text_files"]]
    for name in ("images", "dataset"):
        if kept.get(name):
            kept[name] = name_of_source(kept[name])
    return kept


def name_of_source(source: str) -> str:
    """The last name of a file or folder on this machine; others, as those of data sets, whole."""
    return Path(source).resolve().name if Path(source).exists() else source


def evaluations_of(log_history: Iterable[dict[str, Any]]) -> list[dict[str, float]]:
    """Loss, cosine and deviation by step, of Trainer's log."""
    names = ("loss", "recon_cosine", "frame_deviation")
    return [
        {"step": entry["step"], **{name: entry[f"eval_{name}"] for name in names}}
        for entry in log_history
        if "eval_loss" in entry
    ]
