"""One batch of facts on its way to a delta: what was tried, and what came of it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .delta import LowRankDelta
from .errors import DuplicateKeyError, ValidationError
from .facts import Fact
from .forge_results import Rejected
from .forge_strategies import Attempt
from .leakage import Moments


class Candidate(NamedTuple):
    """What training gave.

    Args:
        delta: None where nothing was trained.
        reports: of each fact.
        moments: of the batch's own prompts.
        failure: kind and words of why there is nothing; empty otherwise.
    """

    delta: LowRankDelta | None
    reports: list[dict[str, Any]]
    moments: Moments
    failure: tuple[str, str] | tuple[()] = ()


@dataclass(eq=False)
class Batch:
    """Facts that share a delta.

    Args:
        key: follows from the domain and the facts: the same facts have the same.
        attempt: that comes next.
        tried: those that failed, for JSON.
    """

    key: str
    facts: tuple[Fact, ...]
    attempt: Attempt
    tried: list[dict[str, Any]] = field(default_factory=list)

    def note(self, metrics: dict[str, Any], failure: str = "", reason: str = "") -> None:
        """Keep what came of the attempt."""
        entry = {"attempt": self.attempt.to_dict(), "failure": failure, "reason": reason}
        self.tried.append({**entry, "metrics": metrics})

    def rejected(self) -> Rejected:
        """As it stands after the last attempt that was judged; one that could not be made tells why
        nothing came after it, not why that failed."""
        last = self.tried[-1]
        judged = next((one for one in reversed(self.tried) if one["metrics"]), last)
        reason = f"{judged['failure']}: {judged['reason']}"
        if judged is not last:
            reason += f". The next attempt was not made: {last['failure']}: {last['reason']}"
        return Rejected(self.facts, reason, {**judged["metrics"], "attempts": self.tried})


def batches_of(
    facts: Sequence[Fact], domain: str, size: int, first: Attempt, taken: set[str]
) -> list[Batch]:
    """The facts in their order, `size` to a batch.

    Args:
        taken: keys that are in use.

    Raises:
        ValidationError: no facts, or one twice.
        DuplicateKeyError: a batch of these very facts is there already.
    """
    if not facts:
        raise ValidationError("forge: expected at least one fact, got none")
    ids = [fact.id for fact in facts]
    twice = sorted({i for i in ids if ids.count(i) > 1}) if len(set(ids)) < len(ids) else []
    if twice:
        raise ValidationError(f"forge: expected every fact once, got {twice[0]} several times")
    found = []
    for start in range(0, len(facts), size):
        own = tuple(facts[start : start + size])
        text = "\n".join(fact.id for fact in own)
        key = f"forge/{domain}/{hashlib.sha256(text.encode()).hexdigest()[:12]}"
        if key in taken:
            raise DuplicateKeyError(
                f"forge: {key}: expected facts that have no delta yet, got {own[0].id} and "
                f"{len(own) - 1} more that have one. Remove it first"
            )
        found.append(Batch(key, own, first))
    return found
