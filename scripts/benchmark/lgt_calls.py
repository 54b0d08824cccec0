"""The calls that `lgt.py` times: models of one preset, a forward or a training step of each."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import timing
import torch
from lgt_peer import SDPAEncoder
from torch import Tensor, nn
from torch.nn import functional as F

from gravity_hf.models.lgt import LGTConfig, LGTForCausalLM

Call = Callable[[], tuple[Tensor, ...]]
_LEAST_TURNS = 3


@dataclass(frozen=True)
class Model:
    """`kind`: lgt or sdpa. `path`: an LGT's implementation of gravity."""

    kind: str
    path: str


def build(model: Model, config: LGTConfig, dtype: str, device: str, training: bool) -> nn.Module:
    """The model in that dtype on `device`; int8: linear layers but masses and head, by torchao."""
    if model.kind == "sdpa":
        module: nn.Module = SDPAEncoder(config)
    else:
        own = type(config)(**{**config.to_diff_dict(), "implementation": model.path})
        module = LGTForCausalLM(own)
    module = module.to(device).train(training)
    if dtype == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(module, Int8WeightOnlyConfig(version=2), _is_quantised)
        return module
    return module.to(getattr(torch, dtype))


def prepare(module: nn.Module, ids: Tensor, work: str) -> Call:
    """ids `[B, T + 1]`: the first T are read, the last T are what a step learns."""
    read, targets = ids[:, :-1], ids[:, 1:]
    if work == "forward":

        def forward() -> tuple[Tensor, ...]:
            with torch.inference_mode():
                return (_logits(module, read),)

        return forward
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)

    def step() -> tuple[Tensor, ...]:
        loss = F.cross_entropy(_logits(module, read).flatten(0, 1).float(), targets.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return (loss.detach(),)

    return step


def calls_in_turns(
    calls: dict[Model, Call], device: str, seconds: float
) -> dict[Model, dict[str, Any]]:
    """`median_ms`, `p20_ms`, `p80_ms`, `least_ms` and the count of `calls`, of each, in turns."""
    times: dict[Model, list[float]] = {model: [] for model in calls}
    end = time.perf_counter() + seconds
    turns = 0
    while turns < _LEAST_TURNS or time.perf_counter() < end:
        for model, call in calls.items():
            timing.synchronize(device)
            start = time.perf_counter()
            call()
            timing.synchronize(device)
            times[model].append((time.perf_counter() - start) * 1e3)
        turns += 1
    return {model: _summary(found) for model, found in times.items()}


def _summary(times: list[float]) -> dict[str, Any]:
    names = ("median_ms", "p20_ms", "p80_ms")
    quantiles = dict(zip(names, timing.quantiles(times), strict=True))
    return {**quantiles, "least_ms": min(times), "calls": len(times)}


def peak_mib(call: Call, device: str) -> float:
    """The most memory that torch has in use during a call, above what it had before, in MiB. The
    call has been made before, so that tables, gradients and optimizer states are there."""
    if device != "cpu":
        timing.synchronize(device)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        timing.synchronize(device)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    used = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        used += event.nbytes()
        peak = max(peak, used)
    return peak / 2**20


def weight_bytes(module: nn.Module) -> int:
    """Of parameters and persistent buffers, each once."""
    tensors = {x.data_ptr() if _plain(x) else id(x): x for x in module.state_dict().values()}
    return sum(_bytes(x) for x in tensors.values())


def _logits(module: nn.Module, ids: Tensor) -> Tensor:
    if isinstance(module, SDPAEncoder):
        return module(ids)
    return module(input_ids=ids, use_cache=False).logits


def _is_quantised(module: nn.Module, name: str) -> bool:
    return isinstance(module, nn.Linear) and not {"gravity", "lm_head"} & set(name.split("."))


def _plain(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter)


def _bytes(x: Tensor) -> int:
    if _plain(x):
        return x.numel() * x.element_size()
    names, _ = x.__tensor_flatten__()  # type: ignore[attr-defined]
    return sum(_bytes(getattr(x, name)) for name in names)
