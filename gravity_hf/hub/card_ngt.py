"""What a card of NGT, or of its twin, may say; see `card_own`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch.nn.functional import softplus

from ..models.ngt import NGTConfig
from ..models.ngt.configuration_checks import SOFTENING_FLOOR
from .card_own import complete_own, results_of_own, tensors_by_layer
from .card_tensors import spread

MODEL_TYPE = NGTConfig.model_type
# Title of a column, key of a row.
COLUMNS = (
    ("strength g", "strength"),
    ("softening e", "softening"),
    ("mass exponent mu", "mass_exponent"),
    ("fading l", "fading"),
    ("bias beta", "bias"),
    ("radius r", "radius"),
)
_CONSTANT = re.compile(
    r"(?P<layer>(?:.*\.)?layers\.\d+)\.attn\.gravity\."
    r"(?P<name>gamma|softening_log|mass_exponent|fading|bias|radius)"
)
# Name of a tensor, key of a row, and how its numbers are read.
_QUANTITIES = (
    ("gamma", "strength", softplus),
    ("softening_log", "softening", lambda x: softplus(x) + SOFTENING_FLOOR),
    ("mass_exponent", "mass_exponent", lambda x: x),
    ("fading", "fading", softplus),
    ("bias", "bias", lambda x: x),
    ("radius", "radius", softplus),
)


def complete_ngt(results: dict[str, Any]) -> dict[str, Any]:
    """`results` with every key that a card reads; see `complete_own`."""
    return complete_own(results, NGTConfig, "an NGT")


def results_of_ngt(folder: Path) -> dict[str, Any]:
    """results.json of a saved NGT, its config and its constants; see `results_of_own`."""
    return results_of_own(folder, MODEL_TYPE, constants_of_ngt(folder))


def constants_of_ngt(folder: Path) -> list[dict[str, Any]]:
    """One row per layer: `layer`, and of each constant that the model learns, by the keys of
    `COLUMNS`, `count`, `lowest`, `median` and `highest` over the heads. Empty for a twin."""
    rows = []
    for layer, found in tensors_by_layer(folder, _CONSTANT).items():
        row: dict[str, Any] = {"layer": layer}
        for name, key, read in _QUANTITIES:
            if name in found:
                row[key] = spread(layer, key, read(found[name]))
        rows.append(row)
    return rows
