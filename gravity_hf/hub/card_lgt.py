"""What a card of LGT may say: its config, its tensors, and results.json where there is one. Its
attention replaces no other, so that there is no host to name."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from safetensors import safe_open

from .. import __version__
from ..models.lgt import LGTConfig
from .card_public import public
from .card_tensors import spread
from .file_names import RESULTS_FILE
from .tensor_files import read_json, shapes_of_export

MODEL_TYPE = LGTConfig.model_type
_CONFIG = "config.json"
_CONSTANT = re.compile(r"(?P<layer>(?:.*\.)?layers\.\d+)\.attn\.gravity\.G")
# Fixed by the config: no parameter.
_FIXED = (".pos_embedding.basis",)


def is_lgt_folder(folder: Path) -> bool:
    """Whether a saved model is an LGT."""
    file = folder / _CONFIG
    return file.is_file() and read_json(file).get("model_type") == MODEL_TYPE


def is_lgt_results(results: dict[str, Any]) -> bool:
    """Whether results.json is that of an LGT and not of a conversion."""
    return results.get("model_type") == MODEL_TYPE


def complete_lgt(results: dict[str, Any]) -> dict[str, Any]:
    """`results` with every key that a card reads, None where nothing is known; no path is left.

    Raises:
        ValueError: the results lack the model's config.
    """
    if not isinstance(results.get("config"), dict):
        raise ValueError(
            "card: expected results of an LGT with its config, got none. Make the card of the "
            "model's folder"
        )
    found = {
        **dict.fromkeys(("training", "evaluation", "conditions", "parameters", "layers")),
        "gravity_hf": __version__,
        **public(results),
    }
    settings = LGTConfig.from_dict(found["config"])
    found["settings"] = settings
    # Of a conversion the card asks these of its host.
    found["host"] = {"card": None, "dtype": found["config"].get("dtype")}
    return found


def facts_of_lgt(folder: Path) -> dict[str, Any]:
    """The facts of a saved LGT: settings and tensors always, what was measured from results.json.

    Raises:
        ValueError: no weights, or files that cannot be read.
    """
    return complete_lgt(results_of_lgt(folder))


def results_of_lgt(folder: Path) -> dict[str, Any]:
    """results.json of a saved LGT, if there is one, with its config, its constants and how many
    parameters it has: all that a card needs, JSON-able, without any path."""
    file = folder / RESULTS_FILE
    return {
        **public(read_json(file) if file.is_file() else {}),
        "model_type": MODEL_TYPE,
        "config": read_json(folder / _CONFIG),
        "parameters": parameters_of(folder),
        "layers": constants_of(folder),
    }


def parameters_of(folder: Path) -> int:
    """How many numbers the model learns, from the headers of its files; tied weights count once."""
    shapes = shapes_of_export(folder, "model")
    return sum(math.prod(shape) for name, shape in shapes.items() if not name.endswith(_FIXED))


def constants_of(folder: Path) -> list[dict[str, Any]]:
    """One row per layer: `layer`, and of `|G|` over its heads `count`, `lowest`, `median` and
    `highest`."""
    rows = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                found = _CONSTANT.fullmatch(name)
                if found:
                    values = tensors.get_tensor(name).float().abs()
                    rows[found["layer"]] = spread(found["layer"], "G", values)
    order = sorted(rows, key=lambda layer: int(layer.rpartition(".")[2]))
    return [{"layer": layer, "G": rows[layer]} for layer in order]
