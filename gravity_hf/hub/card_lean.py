"""What a card of a LeanFormer may say; see `card_own`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch.nn.functional import softplus

from ..models.leanformer import LeanFormerConfig
from ..models.leanformer.configuration_checks import SOFTENING_FLOOR
from .card_own import complete_own, results_of_own, tensors_by_layer
from .card_tensors import spread

MODEL_TYPE = LeanFormerConfig.model_type
# Title of a column, key of a row.
COLUMNS = (("strength g", "strength"), ("softening e", "softening"))
_CONSTANT = re.compile(
    r"(?P<layer>(?:.*\.)?layers\.\d+)\.self_attn\.gravity\.(?P<name>gamma|softening_log)"
)


def complete_leanformer(results: dict[str, Any]) -> dict[str, Any]:
    """`results` with every key that a card reads; see `complete_own`."""
    return complete_own(results, LeanFormerConfig, "a LeanFormer")


def results_of_leanformer(folder: Path) -> dict[str, Any]:
    """results.json of a saved LeanFormer, its config and its constants; see `results_of_own`."""
    return results_of_own(folder, MODEL_TYPE, constants_of_leanformer(folder))


def constants_of_leanformer(folder: Path) -> list[dict[str, Any]]:
    """One row per layer: `layer`, and by the keys of `COLUMNS` the constants that its heads have
    learned, as `card_tensors.spread` gives them. Empty for one that takes dot products."""
    rows = []
    for layer, found in tensors_by_layer(folder, _CONSTANT).items():
        row: dict[str, Any] = {"layer": layer}
        row["strength"] = spread(layer, "strength", softplus(found["gamma"]))
        if "softening_log" in found:
            softening = softplus(found["softening_log"]) + SOFTENING_FLOOR
            row["softening"] = spread(layer, "softening", softening)
        rows.append(row)
    return rows
