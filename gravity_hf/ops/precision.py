"""Products of distances in the full precision of their dtype, whatever the process allows.

Why: rounding q and k to the 10 bits of TF32 changes a score by up to 9 times where q is near k.
"""

from __future__ import annotations

import threading
from types import TracebackType

import torch

_lock = threading.Lock()
_inside = 0
_outside: list[str] = []
_BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
_EXACT = ("ieee", "none")


class exact_products:  # noqa: N801 (used like a function)
    """No TF32, no bfloat16 products, no autocast inside; outside, the process's settings as before.

    The settings belong to the process, so the first one in saves them and the last one out restores
    them; another thread's products can become more exact meanwhile, never less. Where there is
    nothing to change it costs a microsecond or two, which is what a short sequence can afford.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device.type
        self._autocast: torch.autocast | None = None

    def __enter__(self) -> None:
        global _inside
        with _lock:
            _inside += 1
            if _inside == 1:
                values = [backend.fp32_precision for backend in _BACKENDS]
                if any(value not in _EXACT for value in values):
                    _outside[:] = values
                    _set(["ieee" if value != "none" else value for value in values])
        if torch.is_autocast_enabled(self._device):
            self._autocast = torch.autocast(self._device, enabled=False)
            self._autocast.__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        global _inside
        if self._autocast is not None:
            self._autocast.__exit__(kind, error, trace)
        with _lock:
            _inside -= 1
            if _inside == 0 and _outside:
                _set(_outside)
                _outside.clear()


def _set(values: list[str]) -> None:
    for backend, value in zip(_BACKENDS, values, strict=True):
        if backend.fp32_precision != value:
            backend.fp32_precision = value
