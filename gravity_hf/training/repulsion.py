"""Repulsion between the coordinates of tokens: a loss term for any model that has coordinates."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .optim import GravityTrainer

# As published for NGT.
ALPHA = 2.0
MIN_DISTANCE = 1e-3
MAX_SAMPLES = 64


def repulsion_loss(
    coordinates: Tensor,
    masses: Tensor | None = None,
    *,
    alpha: float = ALPHA,
    min_distance: float = MIN_DISTANCE,
    max_samples: int = MAX_SAMPLES,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean over all pairs of tokens of `m_i m_j / max(|z_i - z_j|, min_distance)^alpha`.

    The regulariser that was published with NGT. Pairs closer than `min_distance` get no gradient.
    Every place counts, padding too.

    Args:
        coordinates: `[L, C]` or `[B, L, C]`; the arithmetic is float32, or float64 for float64.
        masses: `[L]`, `[B, L]` or `[B, L, 1]`; None for masses of 1. Detach them where the loss
            is not to shrink them, which is the easiest way to lower it.
        alpha: power of the distance.
        min_distance: in units of the coordinates.
        max_samples: of longer rows so many tokens are drawn, the same places in every row.
        generator: draws them, on its own device. None: from a seed of 0, so that each call draws
            the same; the process's global random numbers are never touched.

    Returns:
        A scalar; 0 where there is no pair.

    Raises:
        ValueError: shapes that do not fit, or fewer than 2 samples.
    """
    z = coordinates if coordinates.dim() == 3 else coordinates[None]
    if z.dim() != 3:
        raise ValueError(
            f"coordinates: expected [L, C] or [B, L, C], got {tuple(coordinates.shape)}"
        )
    if max_samples < 2:
        raise ValueError(f"max_samples: expected at least 2, a pair, got {max_samples}")
    length = z.shape[1]
    m = None if masses is None else _rows_of(masses, z.shape[0], length)
    if length > max_samples:
        chosen = _drawn(length, max_samples, generator).to(z.device)
        z = z[:, chosen]
        m = None if m is None else m[:, chosen]
    # Autocast would round the products; differences, not an expansion, because of equal places.
    with torch.autocast(z.device.type, enabled=False):
        z = z if z.dtype == torch.float64 else z.float()
        distance_sq = (z[:, :, None] - z[:, None]).square().sum(-1).clamp_min(min_distance**2)
        energy = distance_sq.pow(-0.5 * alpha)
        if m is not None:
            m = m.to(z.dtype)
            energy = energy * m[:, :, None] * m[:, None]
        pairs = z.shape[0] * z.shape[1] * (z.shape[1] - 1) // 2
        return energy.triu(diagonal=1).sum() / max(pairs, 1)


class RepulsionTrainer(GravityTrainer):
    """GravityTrainer that adds `repulsion_weight` times the repulsion of the last coordinates.

    For models whose `forward` takes `output_coordinates=True` and then returns `.coordinates`
    `[B, T, C]` and `.masses` `[B, T]`. The weight is that of an optimiser step, whatever the
    gradient accumulation: the term is the mean over the step's batches. (What was published adds it
    to one batch of a step and divides it by their number.) Evaluation has no such term; the
    training loss that is logged has it, and `repulsion` beside it is its mean without the weight.

    Which tokens are drawn depends on the seed and the step alone, so a run that was stopped goes on
    with the same ones, and neither dropout nor the order of the data notices.

    Args:
        repulsion_weight: 0 asks for no coordinates and changes nothing.
        repulsion_interval: add it in every so many optimiser steps only, with the whole weight.
        detach_masses: let it move coordinates only, not the masses.
        repulsion_seed: of the tokens drawn from long rows; None takes that of the data order.

    Raises:
        ValueError: settings that do not fit.
        TypeError: a model without coordinates.
    """

    def __init__(
        self,
        *args: Any,
        repulsion_weight: float = 0.0,
        repulsion_interval: int = 1,
        detach_masses: bool = True,
        repulsion_seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        if not (math.isfinite(repulsion_weight) and repulsion_weight >= 0.0):
            raise ValueError(
                f"repulsion_weight: expected a number of at least 0, got {repulsion_weight!r}"
            )
        if repulsion_interval < 1:
            raise ValueError(
                f"repulsion_interval: expected at least 1 optimiser step, got {repulsion_interval}"
            )
        super().__init__(*args, **kwargs)
        if repulsion_weight:
            require_coordinates(self.model, "repulsion_weight")
        self.repulsion_weight = repulsion_weight
        self.repulsion_interval = repulsion_interval
        self.detach_masses = detach_masses
        order = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.repulsion_seed = order if repulsion_seed is None else repulsion_seed
        self._draws = torch.Generator()
        self._drawn_for: int | None = None
        self._unlogged: list[Tensor] = []

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        due = (self.state.global_step + 1) % self.repulsion_interval == 0
        if not (self.repulsion_weight and model.training and due):
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        asked = {**inputs, "output_coordinates": True}
        loss, outputs = super().compute_loss(model, asked, True, num_items_in_batch)
        masses = outputs["masses"]
        if masses is not None and self.detach_masses:
            masses = masses.detach()
        term = repulsion_loss(outputs["coordinates"], masses, generator=self._generator())
        self._unlogged.append(term.detach())
        share = self.repulsion_weight
        if self._is_scaled(num_items_in_batch):
            share /= self.current_gradient_accumulation_steps
        loss = loss + share * term
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._unlogged:
            logs["repulsion"] = torch.stack(self._unlogged).mean().item()
            self._unlogged.clear()
        super().log(logs, *args, **kwargs)

    def _generator(self) -> torch.Generator:
        """That of the step being made: begun anew with each, so there is no state to save."""
        step = self.state.global_step
        if self._drawn_for != step:
            mixed = np.random.SeedSequence([self.repulsion_seed, step]).generate_state(1)
            self._draws.manual_seed(int(mixed[0]))
            self._drawn_for = step
        return self._draws

    def _is_scaled(self, items: Tensor | int | None) -> bool:
        """Whether the loss is a part of its step's already, or Trainer divides it afterwards."""
        said = getattr(self, "loss_is_scaled_for_ga", None)  # newer transformers
        if said is not None:
            return said
        by_model = self.model_accepts_loss_kwargs and items is not None
        return by_model or self.compute_loss_func is not None


def _rows_of(masses: Tensor, rows: int, length: int) -> Tensor:
    """Masses as `[B, L]`."""
    m = masses[None] if masses.dim() == 1 else masses
    m = m.squeeze(-1) if m.dim() == 3 else m
    if m.shape != (rows, length):
        raise ValueError(
            f"masses: expected [L], [B, L] or [B, L, 1] of {rows} rows of {length} tokens, got "
            f"{tuple(masses.shape)}"
        )
    return m


def _drawn(length: int, count: int, generator: torch.Generator | None) -> Tensor:
    source = torch.Generator().manual_seed(0) if generator is None else generator
    return torch.randperm(length, generator=source, device=source.device)[:count]


def require_coordinates(model: nn.Module, setting: str) -> None:
    """TypeError, which names `setting`, for a model that returns no coordinates."""
    unwrap: Any = getattr(model, "get_base_model", None)  # peft's
    model = model if unwrap is None else unwrap()
    config = getattr(model, "config", None)
    takes = "output_coordinates" in inspect.signature(model.forward).parameters
    if not takes or getattr(config, "attention", None) == "dot_product":
        raise TypeError(
            f"{setting}: expected a model whose forward returns coordinates "
            f"(output_coordinates=True), such as an NGT under gravity, got {type(model).__name__}"
            f"{' with dot-product attention' if takes else ''}. Leave it at 0"
        )
