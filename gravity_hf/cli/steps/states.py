"""What a step leaves for the next one: the gravity tensors and their settings, never the weights.

The weights are the host's until LoRA is merged; the host lies where it was loaded from.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ...config import GravityConfig
from ...integration.hosts import gravity_modules, settings_of
from ...integration.patching import patch_structure
from ...training.files import write_json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TENSORS = "gravity.safetensors"
_SETTINGS = "gravity.json"


def save_gravity_state(model: PreTrainedModel, folder: Path, *, write: bool = True) -> None:
    """Write gravity tensors and settings of a patched model.

    Where tensors are shared among processes, each of them calls this; only one of them should
    `write`.
    """
    tensors = {
        f"{name}.gravity.{key}": _whole(tensor)
        for name, module in gravity_modules(model).items()
        for key, tensor in module.state_dict().items()
    }
    settings = settings_of(model)
    if settings is None:
        raise RuntimeError(
            f"save_gravity_state: expected a patched model, got {type(model).__name__}"
        )
    if write:
        unfinished = folder / f".{_TENSORS}.tmp"
        save_file(tensors, unfinished)
        unfinished.replace(folder / _TENSORS)
        write_json(folder / _SETTINGS, settings.to_dict())


def restore_gravity_state(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Patch a fresh host as the state in `folder` says, with its tensors."""
    settings = json.loads((folder / _SETTINGS).read_text(encoding="utf-8"))
    tensors = load_file(folder / _TENSORS)
    patch_structure(model, GravityConfig.from_dict(settings))
    with torch.no_grad():
        for name, module in gravity_modules(model).items():
            for key, tensor in module.state_dict().items():
                tensor.copy_(tensors[f"{name}.gravity.{key}"])
    return model


def _whole(tensor: Tensor) -> Tensor:
    """A CPU copy of all of it; tensors sharded over processes are gathered."""
    gather = getattr(tensor, "full_tensor", None)
    return (tensor if gather is None else gather()).detach().cpu().clone()
