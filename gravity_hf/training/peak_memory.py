"""The most memory that something took: CUDA's allocator, or the process on Linux."""

from __future__ import annotations

from pathlib import Path

import torch

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Between what is in use and a peak that was just set to it.
_SLACK = 8 * 2**20


class PeakMemory:
    """Inside of `with PeakMemory(device) as memory`; afterwards bytes, or None where nobody counts.

    `peak`: the most that was in use. `above`: how much more that is than before. On CUDA of
    torch's allocator on that device; else of the whole process, by Linux, which counts memory that
    was freed but not given back.
    """

    def __init__(self, device: torch.device | str) -> None:
        self._device = torch.device(device)
        self.peak: int | None = None
        self.above: int | None = None

    def __enter__(self) -> PeakMemory:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            torch.cuda.reset_peak_memory_stats(self._device)
            self._before: int | None = torch.cuda.memory_allocated(self._device)
        else:
            self._before = _resident("VmRSS") if _restarted() else None
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is None:
            return
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
            self.peak = torch.cuda.max_memory_allocated(self._device)
        else:
            self.peak = _resident("VmHWM")
        if self.peak is not None:
            self.above = max(self.peak - self._before, 0)


def _restarted() -> bool:
    """Whether Linux counts the process's peak from here; some sandboxes take the order and do not
    carry it out."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return False
    peak, now = _resident("VmHWM"), _resident("VmRSS")
    return peak is not None and now is not None and peak - now < _SLACK


def _resident(field: str) -> int | None:
    try:
        lines = _STATUS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((1024 * int(x.split()[1]) for x in lines if x.startswith(field)), None)
