"""What the callbacks share: the model under its wrappers, and their state in a checkpoint."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.trainer_callback import ExportableState, TrainerState


def base_model(model: nn.Module) -> Any:
    """The model under peft's wrapper, or `model`."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def restore(callback: ExportableState, state: TrainerState) -> bool:
    """Take the attributes that the checkpoint of a resumed run kept for `callback`: whether it did.

    Called when training begins. transformers restores callbacks only where it is asked to, and
    saves only into entries that are there: one that an older checkpoint lacks is made.
    """
    name = type(callback).__name__
    stored = state.stateful_callbacks.get(name)
    resumed = state.global_step > 0 and isinstance(stored, dict)
    if resumed:
        for attribute, value in stored["attributes"].items():
            setattr(callback, attribute, value)
    state.stateful_callbacks.setdefault(name, callback.state())
    return resumed
