"""Time and memory of a call: median, 20th and 80th percentile; bytes above inputs and outputs."""

from __future__ import annotations

import gc
import importlib.util
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

Run = Callable[[], tuple[Tensor, ...]]
_FLUSH_BYTES = 256 * 2**20  # more than any L2 cache
_MOST_REPEATS = 1000


def milliseconds(run: Run, device: str, budget_ms: float, least: int) -> tuple[float, float, float]:
    """(median, 20th, 80th percentile) of calls that find a cold L2 cache on a GPU.

    Args:
        budget_ms: how long the timed calls take together.
        least: how many there are at least, however long they take.
    """
    run()  # compiles, chooses, allocates
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    once = (time.perf_counter() - start) * 1e3
    if device == "cpu":
        return quantiles(_host_times(run, _repeats(budget_ms, once, least)))
    if once * least <= budget_ms and importlib.util.find_spec("triton") is not None:
        from triton.testing import do_bench

        return tuple(do_bench(run, rep=budget_ms, quantiles=[0.5, 0.2, 0.8]))
    return quantiles(_event_times(run, _repeats(budget_ms, once, least)))


def as_graph(run: Run) -> Run:
    """Replays of `run`, captured in a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run()

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return outputs

    return replay


def extra_mib(run: Run, device: str) -> float:
    """The most memory in use during a call, above what was in use before it and the tensors that it
    returns, in MiB. On a CPU, where freed memory stays with the process: of its first large call,
    in a fresh process."""
    gc.collect()
    if device == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        before = _resident_bytes("VmRSS")
        outputs = run()
        peak = _resident_bytes("VmHWM")
    else:
        run()
        synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        outputs = run()
        synchronize(device)
        peak = torch.cuda.max_memory_allocated()
    returned = sum(x.numel() * x.element_size() for x in outputs)
    return max(peak - before - returned, 0) / 2**20


def free_bytes(device: str) -> int:
    """Memory that a row may still take."""
    if device != "cpu":
        torch.cuda.empty_cache()
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("MemAvailable")).split()[1])


def synchronize(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _repeats(budget_ms: float, once: float, least: int) -> int:
    return max(least, min(_MOST_REPEATS, int(budget_ms / once)))


def _host_times(run: Run, repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _event_times(run: Run, repeats: int) -> list[float]:
    flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in events]


def quantiles(times: list[float]) -> tuple[float, float, float]:
    """(median, 20th, 80th percentile)."""
    if len(times) < 2:
        return times[0], times[0], times[0]
    tenths = statistics.quantiles(times, n=10, method="inclusive")
    return statistics.median(times), tenths[1], tenths[7]


def _resident_bytes(field: str) -> int:
    """Linux's own count. `ru_maxrss` will not do: a new process inherits its parent's."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(field)).split()[1])
