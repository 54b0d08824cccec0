"""Inputs, weights and outputs of the published system, computed by it: tests/golden/lgt."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(__file__).resolve().parents[1] / "golden" / "lgt"
# Tables of reciprocals and Gram matrices round otherwise than differences and divisions.
OUTPUT_TOLERANCE = 2e-5


@functools.cache
def _tensors(file: str) -> dict[str, Tensor]:
    return load_file(FOLDER / f"{file}.safetensors")


@functools.cache
def facts(file: str) -> dict[str, dict[str, Any]]:
    """Constructor arguments and numbers of every case."""
    return json.loads((FOLDER / f"{file}.json").read_text(encoding="utf-8"))


def golden(file: str, case: str, kind: str) -> dict[str, Tensor]:
    """Copies of a case's tensors of one kind, `"in"`, `"state"`, `"out"` or `"grad"`, by name."""
    start = f"{case}/{kind}/"
    found = _tensors(file).items()
    return {key.removeprefix(start): x.clone() for key, x in found if key.startswith(start)}


def largest_difference(actual: Any, expected: Any) -> float:
    """Between the numbers of two nested structures; what else there is must be equal.

    `actual` may have more keys.
    """
    if isinstance(expected, dict):
        return max((largest_difference(actual[k], x) for k, x in expected.items()), default=0.0)
    if isinstance(expected, list):
        pairs = zip(actual, expected, strict=True)
        return max((largest_difference(a, x) for a, x in pairs), default=0.0)
    if isinstance(expected, (bool, str)) or expected is None:
        assert actual == expected
        return 0.0
    return abs(actual - expected)
