"""What a run of the forge gives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from .delta import LowRankDelta
from .facts import Fact
from .forge_strategies import Attempt


@dataclass(frozen=True, eq=False)
class ForgedDelta:
    """A delta that passed its validation and was registered.

    Args:
        id: in the registry, and of the belief where there is a store.
        key: of the belief.
        facts: that it was trained on.
        attempt: the layers, rank and directions that it succeeded with.
        metrics: for JSON: `facts`, `top1`, `paraphrase_top1`, `exact` and `kl_unrelated` (means of
            `evaluate_facts` on prompts that were not trained on, but for `top1` and `exact`),
            `kl_others` (what it changes at the prompts of other deltas) and `attempts`.
        verdict: of the registry, for JSON.
    """

    id: str
    key: str
    facts: tuple[Fact, ...]
    delta: LowRankDelta
    attempt: Attempt
    metrics: dict[str, Any]
    verdict: dict[str, Any]


class Rejected(NamedTuple):
    """Facts without a delta.

    Args:
        reason: why the last attempt failed, in words, and where it could not go further, why.
        metrics: of that attempt, and `attempts`: what was tried, and how each failed.
    """

    facts: tuple[Fact, ...]
    reason: str
    metrics: dict[str, Any]


@dataclass(frozen=True, eq=False)
class ForgeResult:
    """Deltas that are registered, batches that are not, and how long it took."""

    deltas: tuple[ForgedDelta, ...]
    rejected: tuple[Rejected, ...]
    seconds: float

    @property
    def facts(self) -> tuple[Fact, ...]:
        """All that have a delta now."""
        return tuple(fact for forged in self.deltas for fact in forged.facts)

    def to_dict(self) -> dict[str, Any]:
        """For JSON; facts by their ids, deltas by their sizes."""
        return {
            "deltas": [
                {
                    "id": forged.id,
                    "key": forged.key,
                    "facts": [fact.id for fact in forged.facts],
                    "parameters": forged.delta.parameters(),
                    "attempt": forged.attempt.to_dict(),
                    "metrics": forged.metrics,
                    "verdict": forged.verdict,
                }
                for forged in self.deltas
            ],
            "rejected": [
                {"facts": [f.id for f in own], "reason": reason, "metrics": metrics}
                for own, reason, metrics in self.rejected
            ],
            "seconds": self.seconds,
        }
