"""Batches in and tensors out: what the training loop has to know about both."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor


def main_tensor(given: Any) -> Tensor:
    """What a loss is computed from: a tensor itself, the logits or else the last hidden state of a
    transformers output, the first entry of a tuple.

    Raises:
        TypeError: an output with neither.
    """
    if isinstance(given, Tensor):
        return given
    if not isinstance(given, Mapping):
        return given[0]
    name = next((n for n in ("logits", "last_hidden_state") if given.get(n) is not None), None)
    if name is None:
        raise TypeError(
            "TrainingLoop: expected logits or last_hidden_state in the model's output, got "
            f"{sorted(given)}. Give the loop a model that returns one of them"
        )
    return given[name]


def moved(value: Any, device: torch.device | str) -> Any:
    """`value` with every tensor in it on `device`."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(moved(item, device) for item in value)
    return value


def pass_over(batches: Iterator[Any], count: int) -> None:
    """Draw `count` batches, which an interrupted run has had.

    Raises:
        ValueError: there are not as many.
    """
    passed = sum(1 for _ in islice(batches, count))
    if passed < count:
        raise ValueError(
            f"TrainingLoop.fit: resume: expected the batches of the first run, {count} at least, "
            f"got {passed}. Make the iterators as they were made then"
        )
