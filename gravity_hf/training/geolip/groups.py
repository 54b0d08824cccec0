"""Optimiser groups of a geolip: the alphas may learn faster than the weights; nothing decays."""

from __future__ import annotations

from typing import Any

from torch import nn

ALPHAS = "alpha_logits"

__all__ = ["ALPHAS", "geolip_param_groups"]


def geolip_param_groups(model: nn.Module, learning_rate: float) -> list[dict[str, Any]]:
    """Groups of the trainable parameters for any torch optimiser: weights first, alphas last.

    Decay would pull every alpha logit to 0, which is an alpha of half its bound.

    Args:
        model: a geolip, or another model with or without alphas.
        learning_rate: of the weights; that of `alpha_logits` is `config.alpha_lr_multiplier` times
            as large, where the config has one.

    Returns:
        Groups without decay; empty ones are left out.
    """
    faster = float(getattr(model.config, "alpha_lr_multiplier", 1.0))
    weights: list[nn.Parameter] = []
    alphas: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (alphas if name.endswith(ALPHAS) else weights).append(parameter)
    groups = [
        {"params": weights, "lr": learning_rate, "weight_decay": 0.0},
        {"params": alphas, "lr": learning_rate * faster, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
