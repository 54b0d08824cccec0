"""Where a module computes: under offloading its tensors are elsewhere between two calls."""

from __future__ import annotations

import torch
from torch import nn


def execution_device(module: nn.Module) -> torch.device | None:
    """Where the tensors of `module` are, or for offloaded ones (`meta`, accelerate's hooks fetch
    them for a call) where they go; None for a module without parameters."""
    device = next((p.device for p in module.parameters()), None)
    if device is None or device.type != "meta":
        return device
    hooks = (getattr(m, "_hf_hook", None) for m in module.modules())
    devices = (getattr(hook, "execution_device", None) for hook in hooks)
    return next((torch.device(d) for d in devices if d is not None), torch.device("cpu"))
