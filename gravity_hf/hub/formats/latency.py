"""How long exports take beside each other, on the same inputs and in the same minutes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .programs import CACHE, Inputs
from .running import Runner, position_ids
from .samples import completed
from .source import Source

Call = Callable[[], object]
_LEAST_ROUNDS = 3


@dataclass(frozen=True)
class Latency:
    """Milliseconds of one call; `median_ms` and `least_ms` over `calls` of them."""

    median_ms: float
    least_ms: float
    calls: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def interleaved(calls: dict[str, Call], seconds: float) -> dict[str, Latency]:
    """Times of every call, in turns, so that a busy machine is busy for all of them. Each turn
    begins with another one, so that none is always measured after the same other.

    Args:
        calls: by name. Each is called once before, for what a first call loads.
        seconds: how long it takes together, but at least three turns.
    """
    for call in calls.values():
        call()
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    end = time.perf_counter() + seconds
    turns = 0
    while turns < _LEAST_ROUNDS or time.perf_counter() < end:
        first = turns % len(names)
        for name in names[first:] + names[:first]:
            start = time.perf_counter()
            calls[name]()
            times[name].append((time.perf_counter() - start) * 1e3)
        turns += 1
    return {
        name: Latency(statistics.median(found), min(found), len(found))
        for name, found in times.items()
    }


def pass_latency(
    source: Source, runners: dict[str, Runner], ids: Tensor, seconds: float
) -> dict[str, Latency]:
    """One pass over ids `[B, T]` without padding; for decoders the prefill, cache included."""
    calls = {name: _pass(source, runner, ids) for name, runner in runners.items()}
    return interleaved(calls, seconds)


def step_latency(
    source: Source, runners: dict[str, Runner], ids: Tensor, seconds: float
) -> dict[str, Latency]:
    """One more token after ids `[B, T]`, with their cache. Decoders only."""
    calls = {name: _step(runner, ids) for name, runner in runners.items()}
    return interleaved(calls, seconds)


def _pass(source: Source, runner: Runner, ids: Tensor) -> Call:
    inputs: Inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if source.kind != "decoder":
        inputs = completed(source, inputs)
        return lambda: runner.compute(dict(inputs))
    inputs |= _positions(runner, inputs["attention_mask"], ids.shape[1])
    inputs[CACHE] = runner.start(ids.shape[0])
    return lambda: runner.compute(dict(inputs))


def _step(runner: Runner, ids: Tensor) -> Call:
    mask = torch.ones_like(ids)
    prefill: Inputs = {"input_ids": ids[:, :-1], "attention_mask": mask[:, :-1]}
    prefill |= _positions(runner, mask[:, :-1], ids.shape[1] - 1)
    _, cache = runner.compute({**prefill, CACHE: runner.start(ids.shape[0])})
    # The last token: the cache is not changed by a call, which makes a longer one.
    inputs: Inputs = {"input_ids": ids[:, -1:], "attention_mask": mask}
    inputs |= _positions(runner, mask, 1)
    return lambda: runner.compute({**inputs, CACHE: cache})


def _positions(runner: Runner, mask: Tensor, length: int) -> Inputs:
    return {"position_ids": position_ids(mask)[:, -length:]} if runner.positions else {}
