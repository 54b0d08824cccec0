"""What transfer reads of a batch and of a model's outputs: arguments, real tokens, end tensors."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from ..integration.hosts import host_of

if TYPE_CHECKING:
    from .transfer import TransferSettings

Inputs = Mapping[str, Any]


def _base(model: nn.Module) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def forward_arguments(
    model: nn.Module, inputs: Inputs, settings: TransferSettings
) -> dict[str, Any]:
    base = _base(model)
    known = inspect.signature(base.forward).parameters
    arguments = dict(inputs)
    # An encoder-decoder makes its decoder's inputs from the labels.
    makes_inputs = (
        getattr(base.config, "is_encoder_decoder", False) and "decoder_input_ids" not in inputs
    )
    if not settings.loss and not makes_inputs:
        arguments.pop("labels", None)
    elif settings.loss and inputs.get("labels") is None:
        raise ValueError(
            "transfer: loss > 0: expected labels in the batch, got none. Give labels, or loss=0"
        )
    if "use_cache" in known:
        arguments["use_cache"] = False
    if "logits_to_keep" in known and not (settings.logits or settings.loss or makes_inputs):
        # Nobody reads the predictions: do not compute a vocabulary for every token.
        arguments["logits_to_keep"] = 1
    if settings.states:
        arguments["output_hidden_states"] = True
    return arguments


def end_tensors(outputs: Any, settings: TransferSettings) -> dict[str, Tensor]:
    """The tensors at the model's end that a term compares."""
    found: dict[str, Tensor] = {}
    if settings.logits:
        found["logits"] = _require(outputs, "logits", "use states=... for a model without a head")
    if settings.states:
        states = outputs.get("last_hidden_state")
        if states is None:
            name = (
                "decoder_hidden_states" if "decoder_hidden_states" in outputs else "hidden_states"
            )
            states = _require(outputs, name, "use logits=...")[-1]
        found["states"] = states
    return found


def _require(outputs: Any, name: str, advice: str) -> Any:
    value = outputs.get(name)
    if value is None:
        raise ValueError(
            f"transfer: expected a model that returns {name}, got {list(outputs)}; {advice}"
        )
    return value


def last_tensor(outputs: Any) -> Tensor:
    named = (outputs.get(name) for name in ("logits", "last_hidden_state"))
    return next(
        (value for value in (*named, *outputs.values()) if isinstance(value, Tensor)),
        torch.zeros(()),
    )


def real_rows(
    model: nn.Module, inputs: Inputs, name: str, shape: tuple[int, ...] | None = None
) -> Tensor | None:
    """`[B, T]` bool, the tokens that are no padding, on the side of the module `name`; None: all.

    A mask of another shape than `shape` is not about these rows (windows, pooled images)."""
    mask = inputs.get("attention_mask")
    if getattr(_base(model).config, "is_encoder_decoder", False) and "decoder" in name:
        mask, labels = inputs.get("decoder_attention_mask"), inputs.get("labels")
        if mask is None and labels is not None and labels.dim() == 2:
            mask = labels != -100
    is_plain = isinstance(mask, Tensor) and mask.dim() == 2
    if not is_plain or (shape is not None and mask.shape != shape):  # type: ignore[union-attr]
        return None
    return mask.bool()  # type: ignore[union-attr]


def asked_positions(
    model: nn.Module, inputs: Inputs, logits: Tensor, real: Tensor | None
) -> Tensor | None:
    """`[B, T]` bool: where the model is asked to predict; by the labels, else by the padding."""
    labels, shape = inputs.get("labels"), logits.shape[:-1]
    if isinstance(labels, Tensor) and labels.dim() == 2 and labels.shape == shape:
        asked = labels != -100
        if _predicts_next(model):
            # The prediction at t is about the label at t + 1; the last has none.
            asked = asked.roll(-1, dims=1)
            asked[:, -1] = False
        return asked
    return real if real is not None and real.shape == shape else None


def _predicts_next(model: nn.Module) -> bool:
    return host_of(type(_base(model))).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
