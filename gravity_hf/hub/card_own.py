"""What cards of our own models are made from: config, tensors, and results.json where there is one.
Their attention replaces no other, so that there is no host to name."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedConfig

from .. import __version__
from .card_pretrained import results_of_record
from .card_public import public
from .file_names import RESULTS_FILE
from .tensor_files import read_json, shapes_of_export

CONFIG = "config.json"
# Buffers: no parameters.
_FIXED = (".pos_embedding.basis", "scale.mean", "scale.std")


def model_type_of(folder: Path) -> str | None:
    """What a saved model says of itself; None where nothing is saved."""
    file = folder / CONFIG
    return read_json(file).get("model_type") if file.is_file() else None


def complete_own(
    results: dict[str, Any], config_class: type[PreTrainedConfig], noun: str
) -> dict[str, Any]:
    """`results` with every key that a card reads, None where nothing is known; no path is left.

    Args:
        noun: what the model is, for an error, as in "an LGT".

    Raises:
        ValueError: the results lack the model's config.
    """
    if not isinstance(results.get("config"), dict):
        raise ValueError(
            f"card: expected results of {noun} with its config, got none. Make the card of the "
            "model's folder"
        )
    found = {
        **dict.fromkeys(("training", "evaluation", "conditions", "parameters", "layers")),
        "gravity_hf": __version__,
        **public(results),
    }
    found["settings"] = config_class.from_dict(found["config"])
    # Of a conversion the card asks these of its host.
    found["host"] = {"card": None, "dtype": found["config"].get("dtype")}
    return found


def results_of_own(folder: Path, model_type: str, layers: list[dict[str, Any]]) -> dict[str, Any]:
    """results.json of a saved model, or else what the record of its training says, with its config,
    how many parameters it has and its constants, `layers`: all that a card needs, JSON-able,
    without any path."""
    file = folder / RESULTS_FILE
    return {
        **public(read_json(file) if file.is_file() else results_of_record(folder, model_type)),
        "model_type": model_type,
        "config": read_json(folder / CONFIG),
        "parameters": parameters_of(folder),
        "layers": layers,
    }


def parameters_of(folder: Path) -> int:
    """How many numbers the model learns, from the headers of its files; tied weights count once."""
    shapes = shapes_of_export(folder, "model")
    return sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith(_FIXED))


def tensors_by_layer(folder: Path, pattern: re.Pattern[str]) -> dict[str, dict[str, Tensor]]:
    """Tensors, float32, whose names match as a whole: by the groups `layer`, in order, and
    `name`."""
    found: dict[str, dict[str, Tensor]] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                match = pattern.fullmatch(name)
                if match:
                    own = found.setdefault(match["layer"], {})
                    own[match["name"]] = tensors.get_tensor(name).float()
    order = sorted(found, key=lambda layer: int(layer.rpartition(".")[2]))
    return {layer: found[layer] for layer in order}
