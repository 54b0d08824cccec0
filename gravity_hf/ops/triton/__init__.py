"""Gravity attention in Triton. Importing this package does not import triton; calling it does."""

from __future__ import annotations

import importlib.util
import os
from typing import Any

import torch
from torch import Tensor

__all__ = ["gravity_attention_triton", "triton_refusal"]

_INSTALLED = importlib.util.find_spec("triton") is not None


def triton_refusal(
    device: torch.device, dtype: torch.dtype, mask: Tensor | None = None
) -> str | None:
    """Why the kernels cannot serve a call, as a clause; None where they can."""
    if not _INSTALLED:
        return "triton is not installed (pip install triton)"
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET", "0") != "1":
        return f"the device is {device.type}, and triton needs CUDA (or TRITON_INTERPRET=1)"
    if dtype == torch.float64:
        return "the dtype is torch.float64, and the kernels compute in float32"
    if mask is not None and mask.requires_grad:
        return "the float mask requires a gradient, which the kernels do not compute"
    return None


def gravity_attention_triton(*tensors: Any, **options: Any) -> Tensor:
    """See `attention.gravity_attention_triton`."""
    from .attention import gravity_attention_triton as implementation

    return implementation(*tensors, **options)
