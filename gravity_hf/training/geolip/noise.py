"""Noise on what a geolip reads, for learning to find the input without it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

__all__ = ["noisy_rows", "with_noise"]

_INPUTS = ("patches", "pixel_values")


def with_noise(
    model: PreTrainedModel, batch: dict[str, Any], sigma: float, generator: torch.Generator
) -> dict[str, Any]:
    """A collated batch with normal noise on its input; its labels are left as they are.

    Args:
        model: whose feature statistics say what the unit is.
        batch: with `labels`, as GeolipCollator makes it.
        sigma: standard deviation: of pixels in their own units; of patches in units of each
            feature's deviation, `feature_std`. 0: the batch as it is.
        generator: of the CPU, so that the noise is the same on every device.
    """
    if sigma == 0:
        return batch
    name = next(name for name in _INPUTS if name in batch)
    clean: Tensor = batch[name]
    noise = torch.randn(clean.shape, generator=generator, dtype=torch.float32).to(clean.device)
    if name == "patches":
        noise = noise * model.feature_std.to(clean.device)
    return {**batch, name: (clean + sigma * noise).to(clean.dtype)}


def noisy_rows(
    model: PreTrainedModel, rows: list[dict[str, Any]], sigma: float, seed: int
) -> list[dict[str, Any]]:
    """Rows with one draw of noise for good, to evaluate on; the clean row is the label."""
    if sigma == 0:
        return rows
    generator = torch.Generator().manual_seed(seed)
    noisy = []
    for row in rows:
        name = next(name for name in _INPUTS if name in row)
        labelled = {**row, "labels": row.get("labels", row[name])}
        noisy.append(with_noise(model, labelled, sigma, generator))
    return noisy
