"""Rows that a model is measured on: with the same noise at each reading, whole or a few of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ...models.geolip.collating import GeolipCollator
from .noise import noisy_rows

__all__ = ["HeldOut", "batches_in_order", "few_of", "samples_of"]

# What is kept for figures.
_KEPT_ROWS, _KEPT_TOKENS = 32, 4096
# So that the noise of held-out rows is none that was trained on.
_NOISE_SEED = 1_000_003


class HeldOut(torch.utils.data.Dataset):
    """Rows, each with noise of its own that is the same whenever it is read; labels are clean.

    Args:
        model: whose feature statistics say what the unit is.
        rows: of a data set.
        sigma: of the noise; see `noise.with_noise`.
        seed: of the noise.
    """

    def __init__(self, model: PreTrainedModel, rows: Any, sigma: float, seed: int) -> None:
        self.model, self.rows, self.sigma, self.seed = model, rows, sigma, seed

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        (row,) = noisy_rows(
            self.model, [self.rows[index]], self.sigma, self.seed + _NOISE_SEED + index
        )
        return row


def batches_in_order(rows: Any, size: int) -> Iterator[dict[str, Any]]:
    """Collated batches of `size` rows, made one by one."""
    collate = GeolipCollator()
    for start in range(0, len(rows), size):
        yield collate([rows[i] for i in range(start, min(start + size, len(rows)))])


def few_of(rows: Any, tokens: int) -> list[dict[str, Any]]:
    """The first rows, until they have so many tokens between them."""
    few: list[dict[str, Any]] = []
    seen = 0
    while len(few) < len(rows) and (not few or seen < tokens):
        few.append(rows[len(few)])
        seen += _tokens(few[-1])
    return few


def samples_of(rows: Any) -> dict[str, Tensor]:
    """A collated batch of the first rows, for figures: tensors that share no memory."""
    few = few_of(rows, _KEPT_TOKENS)[:_KEPT_ROWS]
    # Inputs that are labels, too, are two tensors to a file.
    return {name: value.clone().contiguous() for name, value in GeolipCollator()(few).items()}


def _tokens(row: dict[str, Any]) -> int:
    if "patches" in row:
        return len(row["patches"])
    # As many as patches of 4 x 4 pixels, whatever their size is.
    return row["pixel_values"].shape[-2] * row["pixel_values"].shape[-1] // 16
