"""transformers' Trainer for a geolip: two rates, noise by step, curves of alphas and frames."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer

from ...models.geolip.collating import GeolipCollator
from .groups import geolip_param_groups
from .history import AlphaHistory, TrainingHistory, geolip_in
from .noise import with_noise

__all__ = ["GeolipTrainer"]

# What a batch says besides its loss.
_MEASURED = ("recon_cosine", "frame_deviation")


class GeolipTrainer(Trainer):
    """transformers' Trainer, in which `alpha_logits` have a rate of their own
    (`config.alpha_lr_multiplier` times that of the weights) and nothing decays.

    Evaluations also have `recon_cosine` and `frame_deviation`, means over valid tokens. Alphas are
    kept in `alpha_history`, logged and, as checkpoints hold them, go on in a resumed run.

    Args:
        denoise: standard deviation of noise on what is trained on, drawn by seed, step and
            process; see `noise.with_noise`. Evaluations get none: give them noisy rows with clean
            labels.
        **kwargs: of Trainer. `data_collator` is a GeolipCollator where none is given.

    Raises:
        ValueError: weight decay, or `denoise` below 0.
        TypeError: no geolip.
        FloatingPointError: in training, a loss that is not finite, where it is logged;
            `logging_nan_inf_filter=True`, transformers' default, hides it.
    """

    def __init__(self, *args: Any, denoise: float = 0.0, **kwargs: Any) -> None:
        kwargs.setdefault("data_collator", GeolipCollator())
        super().__init__(*args, **kwargs)
        if self.args.weight_decay:
            raise ValueError(
                "GeolipTrainer: expected TrainingArguments.weight_decay 0, got "
                f"{self.args.weight_decay}: decay would pull every alpha to half its bound. Leave "
                "it out"
            )
        if not denoise >= 0:
            raise ValueError(f"GeolipTrainer.denoise: expected at least 0, got {denoise!r}")
        if not hasattr(geolip_in(self.model), "alphas"):
            raise TypeError(
                f"GeolipTrainer.model: expected a GeolipModel, got {type(self.model).__name__}. "
                "Train other models with transformers' Trainer"
            )
        self.denoise = denoise
        self.alpha_history = self._history(AlphaHistory) or self._added(AlphaHistory())
        self._draws = (-1, 0)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            super().create_optimizer(model)
            target = geolip_in(self.model if model is None else model)
            groups = geolip_param_groups(target, self.args.learning_rate)
            self.optimizer.param_groups.clear()
            for group in groups:
                self.optimizer.add_param_group(group)
        return self.optimizer

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        if model.training and self.denoise:
            inputs = with_noise(geolip_in(model), inputs, self.denoise, self._noise())
        return super().compute_loss(model, inputs, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        if self.compute_metrics is not None:
            return super().evaluate(*args, **kwargs)
        # For as long as this takes: what `predict` gives are reconstructions.
        self.compute_metrics = _means
        try:
            return super().evaluate(*args, **kwargs)
        finally:
            self.compute_metrics = None

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        if self.compute_metrics is not _means:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        rows, tokens = _sizes(inputs, outputs)
        # A row for each of the batch's, because that is what is gathered over processes.
        measured = torch.stack([outputs[name].float() for name in _MEASURED]).expand(rows, -1)
        weights = measured.new_full((rows, 1), tokens / rows)
        return loss.detach().mean(), measured.contiguous(), weights

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs:
            self._check_loss(logs["loss"])
            for callback in self.callback_handler.callbacks:
                if isinstance(callback, TrainingHistory):
                    logs.update(callback.scalars())
        super().log(logs, *args, **kwargs)

    def _check_loss(self, loss: float) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"GeolipTrainer: expected a finite loss, got {loss} at step "
                f"{self.state.global_step}. Lower the learning rate and start anew, or look for "
                "numbers that are not finite in the data"
            )

    def _noise(self) -> torch.Generator:
        """Of this forward pass and no other, also after a resume."""
        step, draw = self._draws
        draw = draw + 1 if step == self.state.global_step else 0
        self._draws = (self.state.global_step, draw)
        # NumPy mixes several numbers into one seed.
        mixed = np.random.SeedSequence(
            [self.args.seed, self.state.global_step, draw, self.args.process_index]
        )
        return torch.Generator().manual_seed(int(mixed.generate_state(1)[0]))

    def _history(self, kind: type[TrainingHistory]) -> Any:
        found = (c for c in self.callback_handler.callbacks if isinstance(c, kind))
        return next(found, None)

    def _added(self, callback: TrainingHistory) -> Any:
        self.add_callback(callback)
        return callback


def _sizes(inputs: Mapping[str, Any], outputs: Mapping[str, Any]) -> tuple[int, float]:
    """Rows of a batch, and its valid tokens."""
    mask = inputs.get("attention_mask")
    rows, tokens = outputs["omega"].shape[:2]
    return rows, float(rows * tokens if mask is None else mask.sum())


def _means(prediction: EvalPrediction) -> dict[str, float]:
    weights = np.asarray(prediction.label_ids, dtype=np.float64)[:, 0]
    measured = np.asarray(prediction.predictions, dtype=np.float64)
    means = (measured * weights[:, None]).sum(0) / weights.sum()
    return dict(zip(_MEASURED, means.tolist(), strict=True))
