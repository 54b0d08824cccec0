"""One call of a companion: what the host is given, what is read of it, what comes out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from .companion_hosts import blocks_of, has_head, layers_of
from .companion_writing import changed_input
from .configuration_companion import GeolipCompanionConfig

_CACHES = ("past_key_values", "cache")


@dataclass
class GeolipCompanionOutput(ModelOutput):
    """What a host and its companion make of an input of `[B, T]` tokens.

    loss: of the reconstruction; with the host's own added, where the host has a head and was given
    labels. last_hidden_state: `[B, T, C]`, of a host without a head: what was written, with
    `write="residual"` at the last layer, otherwise the host's. logits: of a host with a head.
    omega, omega_attended: `[B, T, D]`. frame: `[B, T, V, d]`, where asked for. reconstruction:
    `[B, T, C]` of the hidden states that were read. recon_cosine, reconstruction_loss: means over
    content. feature_mask: bool `[B, T]`: tokens that are content, neither padding nor special.
    omega_tokens: `[B, T, C]`, and omega_mask, with `write="omega_tokens"`. host_outputs: what the
    host returned, as it returned it.
    """

    loss: Tensor | None = None
    last_hidden_state: Tensor | None = None
    logits: Tensor | None = None
    omega: Tensor | None = None
    omega_attended: Tensor | None = None
    frame: Tensor | None = None
    reconstruction: Tensor | None = None
    recon_cosine: Tensor | None = None
    reconstruction_loss: Tensor | None = None
    feature_mask: Tensor | None = None
    omega_tokens: Tensor | None = None
    omega_mask: Tensor | None = None
    host_outputs: ModelOutput | None = None


def host_inputs(host: PreTrainedModel, given: Mapping[str, Any]) -> dict[str, Any]:
    """What is given, without what is None, and without a cache.

    Raises:
        ValueError: a cache is given or asked for, labels without a head, a mask that is not 2-D.
    """
    inputs = {name: value for name, value in given.items() if value is not None}
    caches = [name for name in _CACHES if name in inputs]
    if caches or inputs.get("use_cache"):
        got = caches[0] if caches else "use_cache=True"
        raise ValueError(
            f"GeolipCompanion: expected all tokens in one call, got a cache ({got}), with which "
            "the companion would see the last ones only. Give the whole input and use_cache=False"
        )
    if "labels" in inputs and not has_head(host):
        raise ValueError(
            f"labels: expected none, as {type(host).__name__} has no head to compare with them. "
            "The loss is that of the reconstruction; compute your own of last_hidden_state"
        )
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        raise ValueError(f"attention_mask: expected [B, T], 0 for padding, got {tuple(mask.shape)}")
    if getattr(host.config, "use_cache", False):
        inputs["use_cache"] = False
    return inputs


def content_mask(
    config: GeolipCompanionConfig, hidden: Tensor, inputs: Mapping[str, Any]
) -> Tensor:
    """Bool `[B, T]`, on the device of `hidden` `[B, T, C]`: tokens that are neither padding nor
    special. Of inputs_embeds nobody knows which are special.

    Raises:
        ValueError: a host that has not one hidden state for each token.
    """
    device = hidden.device
    mask = torch.ones(hidden.shape[:2], dtype=torch.bool, device=device)
    given, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    if given is not None:
        if given.shape != mask.shape:
            raise ValueError(
                f"host: expected a hidden state for each of the {given.shape[1]} tokens of "
                f"attention_mask, got {mask.shape[1]}. Leave the mask out, or take another host"
            )
        mask &= given.to(device) != 0
    if ids is not None and config.special_token_ids:
        special = torch.tensor(config.special_token_ids, device=device)
        mask &= ~torch.isin(ids.to(device), special)
    mask[:, : config.prefix_tokens] = False
    return mask


def run_reading(
    host: PreTrainedModel, layer: int, inputs: dict[str, Any]
) -> tuple[ModelOutput, Tensor]:
    """What the host returns, and the hidden states of the layer with this index, from 0."""
    if layer == layers_of(host.config) and not has_head(host):
        outputs = host(**inputs)
        return outputs, outputs.last_hidden_state
    outputs = host(**{**inputs, "output_hidden_states": True})
    hidden = outputs.hidden_states[layer]
    asked = inputs.get("output_hidden_states", host.config.output_hidden_states)
    if not asked:
        left = {name: value for name, value in outputs.items() if name != "hidden_states"}
        outputs = type(outputs)(**left)
    return outputs, hidden


def run_writing(
    host: PreTrainedModel,
    layer: int,
    inputs: dict[str, Any],
    write: Callable[[Tensor], Tensor],
) -> ModelOutput:
    """What the host returns when its block `layer` reads `write(hidden)`.

    Raises:
        RuntimeError: the host would run its blocks again in the backward pass, or has not run this
            one.
    """
    if host.training and any(
        getattr(module, "gradient_checkpointing", False) for module in host.modules()
    ):
        raise RuntimeError(
            "GeolipCompanion: expected a host that keeps its activations, got one with gradient "
            "checkpointing, which runs layers again, without what is written. Call "
            "companion.host.gradient_checkpointing_disable()"
        )
    calls = 0

    def counted(hidden: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return write(hidden)

    block = blocks_of(host)[layer]
    with changed_input(block, counted):
        outputs = host(**inputs)
    if calls != 1:
        raise RuntimeError(
            f"GeolipCompanion: expected {type(host).__name__} to run its block {layer} once, got "
            f"{calls} times. Write to its last layer instead: read_layer=-1"
        )
    return outputs
