"""Models of this library's own, LGT, the tri-model, NGT and the geolip: they have no host, and no
`GravityConfig` in them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from ..integration.own_models import (
    is_own_config,
    is_own_model,
    read_config,
)

__all__ = [
    "OwnSettings",
    "is_own_config",
    "is_own_folder",
    "is_own_model",
    "own_config",
    "own_settings",
]

_PACKAGE = f"{__package__.partition('.')[0]}.models."
# What of their settings says how a token attends; the rest is sizes.
_GRAVITY = (
    *("force_law", "curvature", "gravitational_constant", "event_horizon", "softening"),
    *("max_force", "force_cap", "exclude_self", "value_projection", "position_type"),
    *("position_scale", "is_causal", "streams", "fusion_gravitational_constant"),
    # Of NGT.
    *("attention", "positions", "law", "repulsive", "learn_softening", "token_masses"),
    *("mass_in_value", "mass_exponent", "head_bias", "coordinate_positions", "position_base"),
    *("content_coordinates", "anchor_coordinates", "hidden_head_coordinates", "asymmetric"),
    *("symmetric_heads", "coordinate_source", "mass_fading", "cutoff", "cutoff_width"),
    # Of geolip, its companion and its prior.
    *("spectral_attention", "use_spectral", "gravity_law", "gravity_softening", "max_alpha"),
    *("lens_mode", "lens_sign", "frame_sign", "geolip", "read_layer", "write", "causal"),
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
        named = self.values.get("law") or _LAWS.get(self.values.get("force_law", "exp"))
        return named or "force"

    def to_dict(self) -> dict[str, Any]:
        return dict(self.values)


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
    return read_config(folder)


def own_settings(config: PreTrainedConfig) -> OwnSettings:
    values = config.to_dict()
    return OwnSettings({name: values[name] for name in _GRAVITY if name in values})
