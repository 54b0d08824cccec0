"""A delta as the registry keeps it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .delta import LowRankDelta
from .leakage import Moments
from .subspaces import Spans, update_spans


@dataclass(frozen=True, eq=False)
class Member:
    """A registered delta, float32 on the CPU, with what it occupies and what its own inputs are."""

    id: str
    delta: LowRankDelta
    spans: dict[str, Spans]
    moments: Moments

    @classmethod
    def of(cls, belief_id: str, delta: LowRankDelta, moments: Moments | None = None) -> Member:
        factors = {n: (_plain(A), _plain(B)) for n, (A, B) in delta.factors.items()}
        delta = LowRankDelta(factors)
        return cls(belief_id, delta, delta_spans(delta), dict(moments or {}))


def delta_spans(delta: LowRankDelta) -> dict[str, Spans]:
    """What each update of a delta reads and writes."""
    return {name: update_spans(A, B) for name, (A, B) in delta.factors.items()}


def _plain(factor: torch.Tensor) -> torch.Tensor:
    return factor.detach().to("cpu", torch.float32, copy=True)
