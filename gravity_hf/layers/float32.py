"""What stays float32 in models of half precision and under autocast."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

_HALF = (torch.float16, torch.bfloat16)


class Float32(nn.Module):
    """A module that stays float32 when its model is converted to half precision: a mass that is off
    by 0.4 % is another temperature, and a position another place."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32:
        def without_rounding(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            rounds = result.dtype in _HALF and tensor.dtype not in _HALF
            return tensor.to(result.device, torch.float32) if rounds else result

        return super()._apply(without_rounding, recurse)


def widen(model: nn.Module) -> None:
    """Make the `Float32` parts of a new model float32 where it was made in half precision, by
    `from_config(config, dtype=...)` say; weights that a checkpoint lacks are made like them."""
    for module in model.modules():
        if isinstance(module, Float32):
            module._apply(lambda tensor: tensor.float() if tensor.dtype in _HALF else tensor)


def without_autocast(device_type: str) -> AbstractContextManager:
    """Under autocast a product would be rounded. Where there is none it costs nothing."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
