"""Models that are gravity by themselves, such as LGT: no host, and no `GravityConfig` in them."""

from __future__ import annotations

import importlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..integration.loading import load_gravity_model

_PACKAGE = f"{__package__.partition('.')[0]}.models."
# What of their settings says how a token attends; the rest is sizes.
_GRAVITY = (
    *("force_law", "curvature", "gravitational_constant", "event_horizon", "softening"),
    *("max_force", "force_cap", "exclude_self", "value_projection", "position_type"),
    *("position_scale", "is_causal", "streams", "fusion_gravitational_constant"),
)
_LAWS = {"exp": "force", "power": "power"}


@dataclass(frozen=True)
class OwnSettings:
    """The gravity settings of such a model, in the place of a host's `GravityConfig`.

    Attributes:
        values: by their names in config.json.
    """

    values: dict[str, Any]

    @property
    def law(self) -> str:
        """`"force"` (softmax over forces) or `"power"` (weights proportional to a power)."""
        return _LAWS.get(self.values.get("force_law", "exp"), "force")

    def to_dict(self) -> dict[str, Any]:
        return dict(self.values)


def is_own_config(config: PreTrainedConfig) -> bool:
    """Whether a config belongs to a model of this library's own."""
    return type(config).__module__.startswith(_PACKAGE)


def is_own_model(model: nn.Module) -> bool:
    return isinstance(model, PreTrainedModel) and is_own_config(model.config)


def is_own_folder(folder: Path) -> bool:
    """Whether `folder` has the config.json of such a model."""
    file = folder / "config.json"
    try:
        model_type = json.loads(file.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError, AttributeError):
        return False
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return False
    return CONFIG_MAPPING[model_type].__module__.startswith(_PACKAGE)


def own_config(folder: Path) -> PreTrainedConfig:
    """The config of such a model; ValueError where a value in it is outside its range."""
    try:
        return AutoConfig.from_pretrained(folder)
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{folder}: expected settings that fit together in config.json: {reason}"
        ) from error


def own_settings(config: PreTrainedConfig) -> OwnSettings:
    values = config.to_dict()
    return OwnSettings({name: values[name] for name in _GRAVITY if name in values})


def own_model_class(config: PreTrainedConfig) -> Any:
    """The class that wrote the checkpoint of such a model.

    ValueError for a name that its package does not have.
    """
    package = importlib.import_module(type(config).__module__.rpartition(".")[0])
    for name in config.architectures or ():
        found = getattr(package, name, None)
        if isinstance(found, type) and issubclass(found, PreTrainedModel):
            return found
    raise ValueError(
        f"expected one of the classes of model type {config.model_type!r} as `architectures` in "
        f"config.json, got {config.architectures!r}. Save the model again with save_pretrained"
    )


def load_own_or_gravity(folder: Path, **options: Any) -> PreTrainedModel:
    """A model of our own in the class that wrote it, or whatever `load_gravity_model` takes."""
    if not is_own_folder(folder):
        return load_gravity_model(folder, **options)
    config = own_config(folder)
    return own_model_class(config).from_pretrained(folder, **options)
