"""What a card of LGT may say; see `card_own`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from ..models.lgt import LGTConfig
from .card_own import complete_own, results_of_own, tensors_by_layer
from .card_tensors import spread

MODEL_TYPE = LGTConfig.model_type
_CONSTANT = re.compile(r"(?P<layer>(?:.*\.)?layers\.\d+)\.attn\.gravity\.(?P<name>G)")


def complete_lgt(results: dict[str, Any]) -> dict[str, Any]:
    """`results` with every key that a card reads; see `complete_own`."""
    return complete_own(results, LGTConfig, "an LGT")


def results_of_lgt(folder: Path) -> dict[str, Any]:
    """results.json of a saved LGT, its config and its constants; see `results_of_own`."""
    return results_of_own(folder, MODEL_TYPE, constants_of(folder))


def constants_of(folder: Path) -> list[dict[str, Any]]:
    """One row per layer: `layer`, and of `|G|` over its heads `count`, `lowest`, `median` and
    `highest`."""
    return [
        {"layer": layer, "G": spread(layer, "G", found["G"].abs())}
        for layer, found in tensors_by_layer(folder, _CONSTANT).items()
    ]
