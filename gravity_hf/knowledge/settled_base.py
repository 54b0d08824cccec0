"""Bases whose library changes weights of its own accord the first time they are used."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn


@torch.no_grad()
def settle(model: nn.Module) -> None:
    """Let bitsandbytes do at once what it does at the first call on a CPU: it packs four-bit
    weights anew and rounds their scales to bfloat16, which a digest would see as a change."""
    module: Any
    for module in model.modules():
        is_new = type(module).__name__ == "Linear4bit" and not module.training
        weight = getattr(module, "weight", None)
        if is_new and isinstance(weight, torch.Tensor) and weight.device.type == "cpu":
            x = torch.zeros(1, module.in_features, dtype=module.compute_dtype or torch.float32)
            # Not through hooks: nobody's answers are computed here.
            module.forward(x)
