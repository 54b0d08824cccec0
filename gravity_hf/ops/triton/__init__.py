"""Gravity attention in Triton. Importing this package does not import triton; calling it does."""

from __future__ import annotations

import importlib.util
import os
import shutil
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .tiles import fits

__all__ = ["gravity_attention_triton", "triton_refusal"]

_INSTALLED = importlib.util.find_spec("triton") is not None
# Triton builds a small launcher for each kernel.
_HAS_COMPILER = any([os.environ.get("CC"), shutil.which("gcc"), shutil.which("clang")])
_OLDEST = (8, 0)
_SOFTCAP = "softcap needs the neutral score of each pair, which the kernels do not compute"


def triton_refusal(
    device: torch.device,
    dtype: torch.dtype,
    mask: Tensor | None = None,
    width: int = 0,
    softcap: float | None = None,
    vectors: torch.dtype | None = None,
) -> str | None:
    """Why the kernels cannot serve a call, as a clause; None where they can. `width`: the larger of
    D and Dv; `vectors`: the dtype of q and k where that is not `dtype`."""
    if not _INSTALLED:
        return "triton is not installed (pip install triton)"
    if os.environ.get("TRITON_INTERPRET", "0") != "1":
        if device.type != "cuda":
            return f"the device is {device.type}, and triton needs CUDA (or TRITON_INTERPRET=1)"
        problem = _device_refusal(device)
        if problem is not None:
            return problem
    if dtype == torch.float64:
        return "the dtype is torch.float64, and the kernels compute in float32"
    if not fits(dtype, width, device, vectors):
        return f"no tile of heads {width} wide in {dtype} fits its memory"
    if softcap is not None:
        return _SOFTCAP
    if mask is not None and mask.requires_grad:
        return "the float mask requires a gradient, which the kernels do not compute"
    return None


@lru_cache(maxsize=64)
def _device_refusal(device: torch.device) -> str | None:
    if torch.version.hip is not None:
        return "the device is an AMD GPU, and the kernels hold instructions of NVIDIA's"
    if not _HAS_COMPILER:
        return "triton needs a C compiler (install gcc or clang, or set CC)"
    properties = torch.cuda.get_device_properties(device)
    capability = (properties.major, properties.minor)
    if capability < _OLDEST:
        return f"the GPU has compute capability {capability}, and the kernels need {_OLDEST}"
    return None


def gravity_attention_triton(*tensors: Any, **options: Any) -> Tensor:
    """See `attention.gravity_attention_triton`. Refuses `softcap`."""
    if options.pop("softcap", None) is not None:
        raise ValueError(
            f"gravity_attention_triton: softcap: expected None, as {_SOFTCAP}. Use impl='chunked'"
        )
    from .attention import gravity_attention_triton as implementation

    return implementation(*tensors, **options)
