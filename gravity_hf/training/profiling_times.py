"""Times of a prompt and of single tokens, and the memory that they take."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..integration.cache_memory import cache_bytes, held_bytes
from ..models.placing import CACHE_FIELD
from .peak_memory import PeakMemory
from .profiling_tiers import Tier, applied, new_cache


@dataclass(frozen=True)
class ProfileSettings:
    """What is read and how often.

    prompt_length: tokens read at once. tokens: that follow one by one. runs: timed repetitions of
    both, after one that does not count. windows: texts of prompt and following tokens that loss and
    agreement are measured on. top_k, exit_threshold: see `tiers_of`.
    """

    prompt_length: int = 512
    tokens: int = 64
    runs: int = 5
    windows: int = 4
    top_k: int = 256
    exit_threshold: float | None = None

    def __post_init__(self) -> None:
        for name in ("prompt_length", "tokens", "runs", "windows", "top_k"):
            least = 2 if name == "tokens" else 1
            if getattr(self, name) < least:
                raise ValueError(
                    f"profile: {name}: expected at least {least}, got {getattr(self, name)!r}"
                )


@dataclass
class _Record:
    """Seconds of prompts and of single tokens; bytes."""

    prompts: list[float] = field(default_factory=list)
    tokens: list[float] = field(default_factory=list)
    cache: int = 0
    peak: int | None = None


def run_times(
    subjects: list[tuple[Tier, PreTrainedModel]],
    window: Tensor,
    settings: ProfileSettings,
    bar: Any,
) -> list[dict[str, Any]]:
    """Times and memory of every tier, measured in turns, so that a busy machine is busy for all.

    Args:
        window: `[1, prompt + tokens]`, what is read.
        bar: a progress bar, moved on at every run.
    """
    records = [_Record() for _ in subjects]
    for turn in range(settings.runs + 1):
        for record, (tier, model) in zip(records, subjects, strict=True):
            with applied(model, tier), PeakMemory(model.device) as memory:
                # The first run compiles, chooses and allocates.
                _run(model, tier, window, settings.tokens, record if turn else _Record())
            if turn and memory.peak is not None:
                record.peak = max(record.peak or 0, memory.peak)
            bar.update()
    prompt = window.shape[1] - settings.tokens
    return [
        {
            "prefill_ms": _percentiles(record.prompts),
            "decode_ms": _percentiles(record.tokens),
            "prefill_tokens_per_s": prompt / statistics.median(record.prompts),
            "decode_tokens_per_s": 1 / statistics.fmean(record.tokens),
            "weight_bytes": weight_bytes(model),
            "cache_bytes": record.cache,
            "peak_bytes": record.peak,
        }
        for record, (_, model) in zip(records, subjects, strict=True)
    ]


def weight_bytes(model: nn.Module) -> int:
    """Of parameters and buffers, each storage once."""
    return held_bytes([*model.parameters(), *model.buffers()])


def _run(model: PreTrainedModel, tier: Tier, window: Tensor, tokens: int, record: _Record) -> None:
    cache = new_cache(model, tier)
    arguments = {CACHE_FIELD: cache, "use_cache": True}
    start = _now(model)
    model(input_ids=window[:, :-tokens], logits_to_keep=1, **arguments)
    record.prompts.append(_now(model) - start)
    for token in window[:, -tokens:].split(1, 1):
        start = _now(model)
        model(input_ids=token, **arguments)
        record.tokens.append(_now(model) - start)
    record.cache = cache_bytes(cache)


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()


def _percentiles(seconds: list[float]) -> dict[str, float]:
    """Median and 95th percentile, in milliseconds."""
    values = torch.tensor(seconds, dtype=torch.float64) * 1e3
    p50, p95 = values.quantile(torch.tensor([0.5, 0.95], dtype=torch.float64)).tolist()
    return {"p50": p50, "p95": p95}
