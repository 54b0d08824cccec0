"""A geolip fitted to data that lies in memory: a plain loop, for experiments.

    from gravity_hf.models.geolip import GeolipConfig, GeolipForReconstruction
    from gravity_hf.training.geolip.fitting import fit
    from gravity_hf.training.geolip.synthetic import synthetic_images

    model = GeolipForReconstruction(GeolipConfig(patch_size=4, image_size=32))
    losses = fit(model, synthetic_images("shapes", 256), steps=200, batch_size=16)

What is to be kept, resumed or spread over devices is trained by `GeolipTrainer`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup

from ...models.geolip.collating import GeolipCollator
from .groups import geolip_param_groups
from .noise import with_noise

__all__ = ["CLIP", "WARMUP", "Row", "Rows", "batches_of", "finite", "fit", "rows_of"]

Row = Mapping[str, Any]
# Rows for GeolipCollator, or one tensor: patches [count, N, P], images [count, C, H, W].
Rows = Sequence[Row] | Tensor

CLIP = 1.0
WARMUP = 30


def fit(
    model: PreTrainedModel,
    rows: Rows,
    *,
    steps: int,
    batch_size: int,
    lr: float = 1e-3,
    seed: int = 0,
    warmup: int = WARMUP,
    denoise: float = 0.0,
    labels: Rows | None = None,
    progress: bool = False,
) -> list[float]:
    """Train `model` where it is: Adam without decay, warm-up and cosine, gradients clipped at 1.

    Batches and noise depend on `seed` alone: on the CPU the same call gives the same model, bit
    for bit.

    Args:
        model: what is trained, in place; its mode is the same afterwards.
        rows: `{"patches": [N, P]}` or `{"pixel_values": [C, H, W]}` each, or one tensor of all.
        steps: optimiser steps.
        batch_size: rows of a step; at most as many as there are.
        lr: largest rate of the weights; that of the alphas is `config.alpha_lr_multiplier` times
            as large.
        seed: of order and noise.
        warmup: steps in which the rate rises.
        denoise: standard deviation of noise that each step adds to its input, in pixels' units or,
            for patches, in those of `config.feature_norm`; what is to be found is the input
            without it.
        labels: clean targets, a row for each of `rows`, where they are not the input itself.
        progress: show a bar where there is a terminal.

    Returns:
        The loss of every step, as it was before the step.

    Raises:
        ValueError: no rows, other numbers of labels, settings outside their range.
        FloatingPointError: the loss is not finite; the model is then of no use.
    """
    _check(rows, steps, batch_size, lr, warmup, denoise, labels)
    device = model.device
    optimizer = torch.optim.Adam(geolip_param_groups(model, lr))
    schedule = get_cosine_schedule_with_warmup(optimizer, min(warmup, steps - 1), steps)
    noise = torch.Generator().manual_seed(seed + 1)
    batches = _endless(rows_of(rows, labels), batch_size, seed)
    was_training = model.training
    model.train()
    losses: list[float] = []
    try:
        for _ in tqdm(range(steps), desc="fit", unit="step", disable=None if progress else True):
            batch = {name: value.to(device) for name, value in next(batches).items()}
            loss = model(**with_noise(model, batch, denoise, noise)).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            schedule.step()
            losses.append(finite(loss, len(losses), "fit"))
    finally:
        model.train(was_training)
    return losses


def rows_of(rows: Rows, labels: Rows | None = None) -> list[dict[str, Any]]:
    """`rows` as a list for GeolipCollator, each with its label where there are any."""
    plain = [dict(row) for row in _listed(rows)]
    if labels is not None:
        for row, label in zip(plain, _listed(labels), strict=True):
            row["labels"] = label["patches" if "patches" in label else "pixel_values"]
    return plain


def batches_of(rows: Rows, batch_size: int, labels: Rows | None = None) -> Iterator[dict[str, Any]]:
    """Collated batches in order, the last one as short as it comes."""
    collate = GeolipCollator()
    plain = rows_of(rows, labels)
    for start in range(0, len(plain), batch_size):
        yield collate(plain[start : start + batch_size])


def _endless(rows: list[dict[str, Any]], batch_size: int, seed: int) -> Iterator[dict[str, Any]]:
    """Batches of one size: epoch after epoch in new orders, the odd rows of an epoch left out."""
    collate = GeolipCollator()
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(rows), generator=generator).tolist()
        for start in range(0, len(rows) - batch_size + 1, batch_size):
            yield collate([rows[i] for i in order[start : start + batch_size]])


def _listed(rows: Rows) -> Sequence[Row]:
    if not isinstance(rows, Tensor):
        return rows
    name = {3: "patches", 4: "pixel_values"}.get(rows.dim())
    if name is None:
        raise ValueError(
            f"rows: expected patches [count, N, P] or images [count, C, H, W], got {rows.dim()} "
            "dimensions"
        )
    return [{name: row} for row in rows]


def _check(
    rows: Rows,
    steps: int,
    batch_size: int,
    lr: float,
    warmup: int,
    denoise: float,
    labels: Rows | None,
) -> None:
    if not 1 <= batch_size <= len(rows):
        raise ValueError(
            f"fit.batch_size: expected 1 to {len(rows)}, the number of rows, got {batch_size!r}"
        )
    if steps < 1 or warmup < 0:
        raise ValueError(
            f"fit.steps, fit.warmup: expected at least 1 and 0, got {steps!r} and {warmup!r}"
        )
    if not (lr > 0 and math.isfinite(lr)) or not (denoise >= 0 and math.isfinite(denoise)):
        raise ValueError(
            "fit.lr, fit.denoise: expected a rate above 0 and a deviation of at least 0, got "
            f"{lr!r} and {denoise!r}"
        )
    if labels is not None and len(labels) != len(rows):
        raise ValueError(
            f"fit.labels: expected one for each of {len(rows)} rows, got {len(labels)}"
        )


def finite(loss: Tensor, step: int, who: str) -> float:
    """The loss as a number; FloatingPointError, by the name of `who` computes it, where it is
    none."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise FloatingPointError(
            f"{who}: expected a finite loss, got {value} at step {step}. Lower the rate, or look "
            "for numbers that are not finite in the data"
        )
    return value
