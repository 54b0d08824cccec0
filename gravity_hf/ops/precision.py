"""Products of distances in the full precision of their dtype, whatever the process allows.

Why: rounding q and k to the 10 bits of TF32 changes a score by up to 9 times where q is near k.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_inside = 0
_outside: list[str] = []


def _backends() -> list:
    return [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """No TF32, no bfloat16 products, no autocast inside; outside, the process's settings as before.

    The settings belong to the process, so the first one in saves them and the last one out restores
    them; another thread's products can become more exact meanwhile, never less.
    """
    global _inside
    with _lock:
        _inside += 1
        if _inside == 1:
            _outside[:] = [backend.fp32_precision for backend in _backends()]
            _set(["ieee" if value != "none" else value for value in _outside])
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        with _lock:
            _inside -= 1
            if _inside == 0:
                _set(_outside)


def _set(values: list[str]) -> None:
    for backend, value in zip(_backends(), values, strict=True):
        if backend.fp32_precision != value:
            backend.fp32_precision = value
