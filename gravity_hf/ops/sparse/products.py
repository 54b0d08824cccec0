"""Products in the full precision of their dtype, in graphs of `torch.compile`, too."""

from __future__ import annotations

import contextlib

import torch

from ..precision import exact_products


def exact(device: torch.device) -> contextlib.AbstractContextManager:
    """`exact_products`; inside a graph, where the process's settings cannot be changed, without
    autocast only: TF32 is then what the process allows."""
    if torch.compiler.is_compiling():
        return torch.autocast(device.type, enabled=False)
    return exact_products(device)
