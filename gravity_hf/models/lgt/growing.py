"""A trained model grows by one layer and computes what it did before."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


def add_layer(model: Any, block: nn.Module) -> Any:
    """Put `block` on top of the layers of `model`; outputs stay, up to LayerNorm's `eps`.

    A block that adds nothing normalises twice what is normalised already. So the affine part of the
    last norm moves to the new block's, its own norms are plain, and the maps onto the sum
    (`attn.out_proj`, `fc2`) are 0. These two have gradients at once, and the rest of the block as
    soon as they have moved. What remains of a change is `eps` beside a variance of 1: each norm
    shrinks its input by 5e-6 of itself.

    An optimizer that exists already does not know the new parameters, and a cache that is in use
    has no room for the layer.

    Args:
        model: an LGT with or without a head; `config.num_hidden_layers` goes up by one.
        block: a new layer, of its config.

    Returns:
        The block.
    """
    base = model.base_model
    block.apply(model._init_weights)
    _copy_placement(base, block)
    with torch.no_grad():
        for linear in (block.attn.out_proj, block.fc2):
            linear.weight.zero_()
        block.fc2.bias.zero_()
        if len(base.layers):
            last = base.layers[-1].norm2
            block.norm2.load_state_dict(last.state_dict())
            last.weight.fill_(1.0)
            last.bias.zero_()
    block.train(base.training)
    base.layers.append(block)
    model.config.num_hidden_layers = len(base.layers)
    return block


def _copy_placement(base: Any, block: nn.Module) -> None:
    """Device and dtype of the final norm; checkpointing as in the other layers."""
    reference = base.norm.weight
    # Gravity stays float32 by itself.
    block.to(device=reference.device, dtype=reference.dtype)
    if len(base.layers):
        last = base.layers[-1]
        block.gradient_checkpointing = last.gradient_checkpointing
        if hasattr(last, "_gradient_checkpointing_func"):
            block._gradient_checkpointing_func = last._gradient_checkpointing_func
