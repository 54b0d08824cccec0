"""A gravity model without the memory of its weights: what its config asks for, and its masses."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn
from transformers import AutoConfig, PreTrainedConfig

from ..integration.hosts import gravity_modules
from ..integration.loading import model_class_of

CHILD = ".gravity."


def skeleton(config: PreTrainedConfig) -> nn.Module:
    """The model of a config, on the meta device."""
    model_class = model_class_of(config)
    with torch.device("meta"):
        model: nn.Module = getattr(model_class, "from_config", model_class)(config)
    return model


def masses_alone(folder: Path) -> nn.Module | None:
    """The model in `folder` with its gravity tensors, and nothing else in memory; None where they
    have other names on disk than in the model."""
    model = skeleton(AutoConfig.from_pretrained(folder))
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            names = [name for name in shard.keys() if CHILD in name]  # noqa: SIM118
            tensors.update((name, shard.get_tensor(name)) for name in names)
    modules = gravity_modules(model)
    wanted = {f"{name}{CHILD}{key}" for name, m in modules.items() for key in m.state_dict()}
    if wanted != set(tensors):
        return None
    for name, module in modules.items():
        own = {key: tensors[f"{name}{CHILD}{key}"] for key in module.state_dict()}
        module.load_state_dict(own, assign=True)
    return model
