"""The Bekenstein term: hidden states are charged for the entropy of a Gaussian as wide as they."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from .callback_state import base_model

_STATE = "_hidden_state"
_LEAST_VARIANCE = 1e-8


def bekenstein_penalty(
    hidden: Tensor,
    weight: float = 1e-4,
    *,
    floor: float | None = 0.0,
    mask: Tensor | None = None,
) -> Tensor:
    """`weight * mean(max(H, floor))`, `H = ln(2 pi e var) / 2` in nats, `var` over the width.

    `H` is the differential entropy of a Gaussian with the (unbiased) variance of a vector. It is
    negative for a variance below 0.0585, and without a floor its minimum is a collapsed vector:
    the published term, which can take a loss below zero. With a floor, vectors at it are neither
    charged nor pushed further down.

    Args:
        hidden: `[..., D]`, D at least 2; computed in float32 or better.
        weight: of the term in the loss.
        floor: the entropy below which nothing is charged, nats; None: none, as published. At 0.0 or
            above the term is never negative.
        mask: `[...]`, true or nonzero for vectors that count; None: all do.

    Returns:
        A scalar.

    Raises:
        ValueError: D below 2, where there is no variance; a mask of another shape.
    """
    if hidden.shape[-1] < 2:
        raise ValueError(
            "bekenstein_penalty: hidden: expected a width of at least 2, got shape "
            f"{tuple(hidden.shape)}. Pass hidden states [..., D]"
        )
    if mask is not None and mask.shape != hidden.shape[:-1]:
        raise ValueError(
            f"bekenstein_penalty: mask: expected shape {tuple(hidden.shape[:-1])}, got "
            f"{tuple(mask.shape)}. Pass one number for each vector"
        )
    wide = hidden if hidden.dtype == torch.float64 else hidden.float()
    variance = wide.var(dim=-1).clamp(min=_LEAST_VARIANCE)
    entropy = 0.5 * torch.log(2 * math.pi * math.e * variance)
    if floor is not None:
        entropy = entropy.clamp(min=floor)
    if mask is None:
        return weight * entropy.mean()
    counted = mask.to(entropy.dtype)
    return weight * (entropy * counted).sum() / counted.sum().clamp(min=1.0)


class ChargedState(NamedTuple):
    """`hidden` `[B, T, D]`; `mask` `[B, T]`, 0 for padding, or None."""

    hidden: Tensor
    mask: Tensor | None


def state_arguments(model: nn.Module) -> dict[str, Any]:
    """What asks a model for its hidden states; nothing for one that tells them anyway, or never."""
    base = base_model(model)
    accepted = inspect.signature(base.forward).parameters
    takes_more = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    asks = "output_hidden_states" in accepted or (takes_more and isinstance(base, PreTrainedModel))
    return {"output_hidden_states": True} if asks else {}


def charged_states(outputs: Any, inputs: Any) -> list[ChargedState]:
    """What the term is charged on: each layer's states (not the embeddings), or of a model of
    several streams each stream's, or else the `last_hidden_state`; with the masks that `inputs`
    has for them. Empty for outputs that tell none."""
    if not isinstance(outputs, Mapping):
        return []
    told = outputs.get("hidden_states")
    if isinstance(told, (tuple, list)) and told:
        return [_with_mask(state, inputs, "attention_mask") for state in told[1:] or told]
    names = [key.removesuffix(_STATE) for key in outputs if key.endswith(_STATE)]
    streams = [name for name in names if name != "last"] or names
    return [
        _with_mask(
            outputs[name + _STATE],
            inputs,
            "attention_mask" if name == "last" else f"{name}_attention_mask",
        )
        for name in streams
    ]


def _with_mask(hidden: Tensor, inputs: Any, name: str) -> ChargedState:
    mask = inputs.get(name) if isinstance(inputs, Mapping) else None
    fits = isinstance(mask, Tensor) and mask.shape == hidden.shape[:-1]
    return ChargedState(hidden, mask if fits else None)


def states_penalty(states: list[ChargedState], weight: float, floor: float | None) -> Tensor:
    """The mean of `bekenstein_penalty` over `states`."""
    terms = [bekenstein_penalty(s.hidden, weight, floor=floor, mask=s.mask) for s in states]
    return torch.stack([term.to(terms[0].device) for term in terms]).mean()


class BekensteinMixin:
    """Put before a Trainer class: adds the term to the loss of every training step.

    Asks the model for its hidden states (`output_hidden_states=True`), which costs no computation;
    they stay alive until the backward pass, as most of them would anyway. A tri-model is charged on
    what its streams tell. Padding, told by the attention masks, is not charged. Losses of
    evaluation are without the term. `bekenstein` in the logs is its mean since the last log.

    Where a layer ends in a norm, as LGT's do, the variance of its states is that of the norm's own
    gains, so the term acts on those.

    Args:
        bekenstein_weight: of the term.
        bekenstein_floor: entropy below which nothing is charged, nats.

    Raises:
        ValueError: at the first step, for a model that tells no hidden states.
    """

    def __init__(
        self,
        *args: Any,
        bekenstein_weight: float = 1e-4,
        bekenstein_floor: float | None = 0.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self.bekenstein_weight = bekenstein_weight
        self.bekenstein_floor = bekenstein_floor
        self._charged: list[Tensor] = []

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        given: Any = super()
        model_inside: nn.Module = self.model  # type: ignore[attr-defined]
        if not model.training:
            return given.compute_loss(model, inputs, return_outputs, num_items_in_batch)
        asked = {**inputs, **state_arguments(model_inside)}
        loss, outputs = given.compute_loss(model, asked, True, num_items_in_batch)
        states = charged_states(outputs, inputs)
        if not states:
            raise ValueError(
                f"{type(self).__name__}: expected hidden states in the model's output, got none "
                f"from {type(model_inside).__name__}. Use a model that takes "
                "output_hidden_states=True, or a plain Trainer"
            )
        term = states_penalty(states, self.bekenstein_weight, self.bekenstein_floor)
        self._charged.append(term.detach())
        total = loss + term.to(loss.device) / self._shares(num_items_in_batch)
        return (total, outputs) if return_outputs else total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self._charged and "loss" in logs:
            logs = {**logs, "bekenstein": torch.stack(self._charged).mean().item()}
            self._charged = []
        given: Any = super()
        given.log(logs, *args, **kwargs)

    def _shares(self, num_items_in_batch: Any) -> int:
        """Into how many parts the term of one optimiser step falls. Trainer divides a loss by the
        number of accumulated batches unless the loss was made over all of their items at once."""
        trainer: Any = self
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            by_items = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            scaled = by_items or trainer.compute_loss_func is not None
        return int(trainer.current_gradient_accumulation_steps) if scaled else 1


class BekensteinTrainer(BekensteinMixin, Trainer):
    """transformers' Trainer with the Bekenstein term; see `BekensteinMixin`."""
