"""What `ngt.py` times: models of one case side by side, a step, a forward or a generation of each,
in turns."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import timing
import torch
from lgt_calls import peak_mib, weight_bytes
from ngt_arms import matched_settings
from torch import Tensor, nn

Call = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Subject:
    """`call` does the work once; `known`: parameters, memory and what else is said of the model."""

    call: Call
    known: dict[str, Any]


def build(
    name: str,
    shape: str,
    vocabulary: int,
    work: str,
    device: str,
    *,
    mode: str,
    size: tuple[int, int],
    made: int,
) -> Subject:
    """The model of an arm, on `device`, warm: it has been called, compiled and measured for memory.

    Args:
        name, shape, vocabulary: as in `ngt_arms.matched_settings`.
        work: `step`, `forward` or `generate`.
        mode: of `ngt.MODES`; compiled is for this size alone.
        size: of the tokens that are read, `[B, T]`.
        made: how many tokens a generation adds.
    """
    from gravity_hf.models.ngt import NGTConfig, NGTForCausalLM

    settings = matched_settings(name, shape, vocabulary)
    torch.manual_seed(0)
    model = NGTForCausalLM(NGTConfig(**settings)).to(device).train(work == "step")
    if work == "generate":
        model = model.to(torch.bfloat16 if device == "cuda" else torch.float32)
    ids = torch.randint(vocabulary, size).to(device)
    with graphs_or_error(mode):
        call = _CALLS[work](_compiled(model, mode, ids), ids, device, made)
        if mode == "graphs":
            call = _marked(call)
        for _ in range(3):
            call()
    timing.synchronize(device)
    known = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "intermediate_size": settings["intermediate_size"],
    }
    if work != "generate" and mode != "graphs":
        # AdamW keeps two moments beside the weights.
        own = weight_bytes(model) * (3 if work == "step" else 1) / 2**20
        known["peak_mib"] = own + peak_mib(call, device)
    return Subject(call, known)


def _compiled(model: nn.Module, mode: str, ids: Tensor) -> nn.Module:
    if mode == "eager":
        return model
    if mode == "compile":
        return torch.compile(model, dynamic=False)
    # The tokens stay where they are: graphs read them there.
    torch._dynamo.mark_static_address(ids)
    return torch.compile(model, dynamic=False, mode="reduce-overhead")


def _marked(call: Call) -> Call:
    def marked() -> tuple[Tensor, ...]:
        # What the call before left is no longer needed.
        torch.compiler.cudagraph_mark_step_begin()
        return call()

    return marked


@contextlib.contextmanager
def graphs_or_error(mode: str) -> Iterator[None]:
    """RuntimeError where a part that should have become a CUDA graph did not: it would run, only
    slower, and pass for one."""
    counted = torch._dynamo.utils.counters["inductor"]
    before = counted["cudagraph_skips"]
    yield
    skipped = counted["cudagraph_skips"] - before
    if mode == "graphs" and skipped > 0:
        raise RuntimeError(f"expected CUDA graphs alone, got {skipped} parts without one")


def _step(model: nn.Module, ids: Tensor, device: str, made: int) -> Call:
    cuda = device == "cuda"
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.1, fused=cuda)

    def call() -> tuple[Tensor, ...]:
        with torch.autocast(device, torch.bfloat16, enabled=cuda):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return (loss.detach(),)

    return call


def _forward(model: nn.Module, ids: Tensor, device: str, made: int) -> Call:
    def call() -> tuple[Tensor, ...]:
        amp = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")
        with torch.no_grad(), amp:
            return (model(input_ids=ids, use_cache=False).logits,)

    return call


def _generate(model: nn.Module, ids: Tensor, device: str, made: int) -> Call:
    settings = {"max_new_tokens": made, "min_new_tokens": made, "do_sample": False}

    def call() -> tuple[Tensor, ...]:
        seen = torch.ones_like(ids)
        return (model.generate(ids, attention_mask=seen, pad_token_id=0, **settings),)

    return call


_CALLS = {"step": _step, "forward": _forward, "generate": _generate}


def rounds(
    subjects: dict[str, Subject], device: str, turns: int, calls: int, tokens: int, peer: str
) -> dict[str, dict[str, Any]]:
    """Milliseconds of a call, and how many times those of `peer` in the same round: medians with
    the 20th and 80th percentile.

    Args:
        subjects: who takes turns.
        turns: rounds.
        calls: of each subject in a round, timed together.
        tokens: that one call generates, where the time is that of a token; else 1.
    """
    times: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(turns):
        for name, subject in subjects.items():
            timing.synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                subject.call()
            timing.synchronize(device)
            times[name].append((time.perf_counter() - start) * 1e3 / (calls * tokens))
    found: dict[str, dict[str, Any]] = {}
    for name, own in times.items():
        median, low, high = timing.quantiles(own)
        found[name] = {"median_ms": median, "p20_ms": low, "p80_ms": high, "rounds": turns}
        if peer in times:
            ratios = [mine / other for mine, other in zip(own, times[peer], strict=True)]
            _, low, high = timing.quantiles(ratios)
            found[name] |= {"ratio": statistics.median(ratios), "ratio_p20": low, "ratio_p80": high}
    return found
