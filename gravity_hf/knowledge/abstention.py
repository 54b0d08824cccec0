"""When to say nothing: operating points for a target precision, and stopping rows of a batch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import StoppingCriteria

from .errors import ValidationError
from .statistics import wilson_interval

STALE_ABOVE = 0.1


@dataclass(frozen=True)
class OperatingPoint:
    """A threshold on a score, and what keeping all at or above it did on the data it is from.

    Attributes:
        threshold: keep a case where its score is at least this.
        reached: whether the target precision was reached; if not, the threshold keeps nothing.
        precision, recall: of the kept cases the share that is right; of the right ones the share
            that is kept. The precision of nothing kept is NaN.
        precision_low, precision_high: Wilson's 95 % interval.
        kept, cases: how many.
    """

    threshold: float
    reached: bool
    precision: float
    recall: float
    precision_low: float
    precision_high: float
    kept: int
    cases: int


def operating_point(
    scores: Sequence[float], right: Sequence[bool], precision: float = 0.95
) -> OperatingPoint:
    """The lowest threshold whose kept cases are right in at least the share `precision`.

    Equal scores are kept or left together.

    Raises:
        ValidationError: no cases, lists of unequal length, scores that are not finite, a precision
            outside (0, 1].
    """
    if not 0 < precision <= 1:
        raise ValidationError(f"precision: expected in (0, 1], got {precision!r}")
    if len(scores) != len(right) or not scores:
        raise ValidationError(
            f"operating_point: expected as many scores as outcomes and at least one, got "
            f"{len(scores)} and {len(right)}"
        )
    if not all(math.isfinite(score) for score in scores):
        raise ValidationError("operating_point: expected finite scores, got NaN or an infinity")
    # Half way to the next lower score, so that rounding elsewhere does not move a case across.
    levels = sorted(set(scores), reverse=True)
    threshold, reached = math.nextafter(levels[0], math.inf), False
    for i, level in enumerate(levels):
        kept = [ok for score, ok in zip(scores, right, strict=True) if score >= level]
        if sum(kept) / len(kept) >= precision:
            below = levels[i + 1] if i + 1 < len(levels) else level
            middle = (level + below) / 2
            # Between neighbouring numbers there is none: the middle is one of them.
            threshold, reached = (middle if middle > below else level), True
    return _measured(scores, right, threshold, reached)


def _measured(
    scores: Sequence[float], right: Sequence[bool], threshold: float, reached: bool
) -> OperatingPoint:
    kept = [bool(ok) for score, ok in zip(scores, right, strict=True) if score >= threshold]
    total = sum(map(bool, right))
    low, high = wilson_interval(sum(kept), len(kept))
    return OperatingPoint(
        threshold=threshold,
        reached=reached,
        precision=sum(kept) / len(kept) if kept else math.nan,
        recall=sum(kept) / total if total else math.nan,
        precision_low=low,
        precision_high=high,
        kept=len(kept),
        cases=len(scores),
    )


def changed_share(before: Iterable[str], now: Iterable[str]) -> float:
    """How far a store moved since: beliefs that came or went, whichever are more, of those before.

    Both are `<id>-v<version>` of the active beliefs; an update counts once.
    """
    before, now = set(before), set(now)
    return max(len(before - now), len(now - before)) / max(1, len(before))


def is_stale(before: Iterable[str], now: Iterable[str]) -> bool:
    """Whether more than a tenth of the beliefs changed since a calibration was made."""
    return changed_share(before, now) > STALE_ABOVE


class AbstainBelow(StoppingCriteria):
    """Stops the rows whose confidence is below a threshold, after their first new token.

    Args:
        confidences: called at every step, gives the confidence of each row, in [0, 1].
        threshold: rows below it are stopped.
    """

    def __init__(self, confidences: Callable[[], Sequence[float]], threshold: float) -> None:
        if not 0 <= threshold <= 1:
            raise ValidationError(
                f"abstain: expected a confidence from 0 to 1 to stop below, got {threshold!r}"
            )
        self._confidences, self.threshold = confidences, threshold

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """`[B]`, bool: True where the row is to stop."""
        stop = [confidence < self.threshold for confidence in self._confidences()]
        if len(stop) != len(input_ids):
            raise ValidationError(
                f"abstain: expected a confidence for each of {len(input_ids)} rows, got "
                f"{len(stop)}. Give generate the recorder's processor() too"
            )
        return torch.tensor(stop, dtype=torch.bool, device=input_ids.device)
