"""What a folder's tensors say of a gravity model, read without loading it."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor
from torch.nn.functional import softplus

from ..config import EPSILON_FLOOR
from .tensor_files import shapes_of_export

MARK = ".gravity."
_MASSES = ".gravity.mass_log"
# What peft puts before a model's own names.
_PEFT = "base_model.model."
# Key in a row, the tensor that it comes from, what people read of it.
_QUANTITIES: tuple[tuple[str, str, Callable[[Tensor], Tensor]], ...] = (
    ("mass", _MASSES, softplus),
    ("softening", ".gravity.softening_log", lambda log: softplus(log).clamp(min=EPSILON_FLOOR)),
    ("key_radius", ".gravity.key_radius_sq", Tensor.sqrt),
)


def gravity_tensors(folder: Path) -> dict[str, Tensor]:
    """Every gravity tensor of a model or adapter folder, by name, in the order of the layers."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            names = [name for name in tensors.keys() if MARK in name]  # noqa: SIM118
            found.update({name: tensors.get_tensor(name) for name in names})
    return dict(sorted(found.items(), key=lambda item: _natural(item[0])))


def gravity_layers(folder: Path) -> list[dict[str, Any]]:
    """One row per converted attention module.

    Keys: `layer` (its name), and for each of `mass`, `softening` (units of squared distance) and
    `key_radius` (units of distance) the `count` of values and the `lowest`, `median` and `highest`;
    None where the model has none.

    Raises:
        ValueError: no gravity tensors, or masses that are not finite.
    """
    tensors = gravity_tensors(folder)
    layers = [name.removesuffix(_MASSES) for name in tensors if name.endswith(_MASSES)]
    if not layers:
        raise ValueError(
            f"{folder}: expected gravity tensors named '*{_MASSES}' in its safetensors files, "
            "found none. Save the patched model again with save_pretrained"
        )
    return [{"layer": name.removeprefix(_PEFT), **_row(name, tensors)} for name in layers]


def count_parameters(folder: Path) -> dict[str, int]:
    """How many numbers the files hold, from their headers: `gravity`, and all `others`."""
    stem = "adapter_model" if (folder / "adapter_config.json").is_file() else "model"
    counts = {"gravity": 0, "others": 0}
    for name, shape in shapes_of_export(folder, stem).items():
        counts["gravity" if MARK in name else "others"] += math.prod(shape)
    return counts


def _row(layer: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for key, suffix, readable in _QUANTITIES:
        tensor = tensors.get(layer + suffix)
        row[key] = None if tensor is None else spread(layer, key, readable(tensor.float()))
    return row


def spread(layer: str, key: str, values: Tensor) -> dict[str, Any]:
    """`count`, `lowest`, `median` and `highest` of the values of a layer.

    Raises:
        ValueError: values that are not finite.
    """
    numbers = values.flatten().tolist()
    if not all(map(math.isfinite, numbers)):
        raise ValueError(
            f"{layer}: expected finite values, got others in its {key.replace('_', ' ')}. "
            "Calibration was not finished, or training diverged: do it again before saving"
        )
    return {
        "count": len(numbers),
        "lowest": min(numbers),
        "median": statistics.median(numbers),
        "highest": max(numbers),
    }


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
