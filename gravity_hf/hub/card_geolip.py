"""What a card of a geolip may say: its config with its verdict, its record, and its tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from ..models.geolip import GeolipConfig, GeolipModel
from ..models.geolip.lens import lens_error, orthonormal
from .card_own import CONFIG, complete_own, results_of_own, tensors_by_layer
from .card_public import public
from .card_tensors import spread
from .tensor_files import read_json

MODEL_TYPE = GeolipConfig.model_type
PROCESSOR_FILE = "preprocessor_config.json"
_ALPHAS = re.compile(r"(?P<layer>(?:.*\.)?spectral\.layers\.\d+)\.(?P<name>alpha_logits)")
_BASIS = "lens.basis"


def complete_geolip(results: dict[str, Any]) -> dict[str, Any]:
    """`results` with every key that a card reads; see `complete_own`."""
    found = complete_own(results, GeolipConfig, "a geolip")
    found.setdefault("lens_error", None)
    found.setdefault("has_processor", False)
    return {**found, "verdict": found["settings"].verdict}


def results_of_geolip(folder: Path) -> dict[str, Any]:
    """results.json of a saved geolip with its config, and what its tensors say: `layers`,
    `lens_error`, `parameters`; `has_processor`, whether an image processor lies beside it."""
    settings = GeolipConfig.from_dict(read_json(folder / CONFIG))
    found = {
        **results_of_own(folder, MODEL_TYPE, alphas_of_geolip(folder, settings)),
        "parameters": count_parameters(settings),
        "lens_error": lens_error_of(folder, settings),
        "has_processor": (folder / PROCESSOR_FILE).is_file(),
    }
    # Its config may name a host by a path.
    return public(found)


def count_parameters(settings: GeolipConfig) -> int:
    """How many numbers a geolip of these settings learns: buffers lie in its files, too."""
    with torch.device("meta"):
        model = GeolipModel(settings)
    return sum(parameter.numel() for parameter in model.parameters())


def alphas_of_geolip(folder: Path, settings: GeolipConfig) -> list[dict[str, Any]]:
    """One row per spectral layer: `layer`, and `alpha` with `count`, `lowest`, `median` and
    `highest` over its modes. Of a companion, too."""
    return [
        {
            "layer": layer,
            "alpha": spread(layer, "alpha", settings.max_alpha * found["alpha_logits"].sigmoid()),
        }
        for layer, found in tensors_by_layer(folder, _ALPHAS).items()
    ]


def lens_error_of(folder: Path, settings: GeolipConfig) -> float | None:
    """`max |E^T E - 1|` of the lens in the folder's files, of a companion, too; None where there
    is no such tensor."""
    basis = tensor_of(folder, _BASIS)
    if basis is None:
        return None
    return lens_error(orthonormal(basis) if settings.lens_mode == "learned" else basis)


def inner_settings(config: Mapping[str, Any]) -> GeolipConfig:
    """Of the geolip inside of a companion, from the companion's config.json."""
    return GeolipConfig.from_dict(dict(config.get("geolip") or {}))


def tensor_of(folder: Path, ending: str) -> Tensor | None:
    """The tensor in the folder's files that is called so, or so at its end; float32."""
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if name == ending or name.endswith(f".{ending}"):
                    found: Tensor = tensors.get_tensor(name)
                    return found.float()
    return None
