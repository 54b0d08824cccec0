"""Which model types are examined by default: named families, and a third of the others."""

from __future__ import annotations

import hashlib

import transformers
from hosts import FAMILIES, PECULIAR

_PARTS = 3


def named_types() -> set[str]:
    """The model types of the hosts that all tests use."""
    configs = [entry[0] for entry in (*FAMILIES.values(), *PECULIAR.values())]
    return {getattr(transformers, name).model_type for name in configs}


def part_of(model_type: str) -> int:
    """One of three parts, the same on every machine and in every run, unlike `hash`."""
    return int(hashlib.sha256(model_type.encode()).hexdigest(), 16) % _PARTS
