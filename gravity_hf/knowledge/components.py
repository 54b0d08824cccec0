"""What a confidence is made of: how near texts are, how deltas lie to each other, what they do."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from .delta import LowRankDelta
from .subspaces import angle_score

# Shares of routing strength, coherence and coverage in the uncalibrated score, and the score below
# which it calls an answer uncertain.
SHARES = {"routing": 0.4, "coherence": 0.3, "coverage": 0.3}
UNCERTAIN_BELOW = 0.3
_ENOUGH = 5


def pair_score(first: LowRankDelta, second: LowRankDelta) -> float:
    """Smallest principal angle between what two deltas read, over pi / 2, at the worst map that
    both change: 1 where they are orthogonal or share no map, 0 where they share a direction."""
    shared = sorted(first.factors.keys() & second.factors.keys())
    spans = ((first.factors[name][0].T, second.factors[name][0].T) for name in shared)
    return min((angle_score(a, b) for a, b in spans), default=1.0)


def mean_pair_score(deltas: Sequence[LowRankDelta]) -> float:
    """Over all pairs; 1 for fewer than two deltas."""
    pairs = [pair_score(a, b) for a, b in itertools.combinations(deltas, 2)]
    return math.fsum(pairs) / len(pairs) if pairs else 1.0


def components(scores: Sequence[float], pairs: float, active: int) -> dict[str, float]:
    """Routing strength, coherence and coverage of the routed beliefs, each in [0, 1].

    With scores `s`, `n` of them, and `pairs` their mean pair score: strength is `max s`; coherence
    is `0.7 pairs + 0.3 / (1 + 10 var s)`, of a single one 1; coverage is
    `0.6 mean s + 0.4 min(1, n / min(5, active))`. Without any, all are 0.

    Args:
        scores: of the routed beliefs.
        pairs: see `mean_pair_score`.
        active: beliefs in the store.
    """
    count = len(scores)
    if count == 0:
        return dict.fromkeys(SHARES, 0.0)
    mean = math.fsum(scores) / count
    variance = math.fsum((s - mean) ** 2 for s in scores) / count
    coherence = 1.0 if count == 1 else 0.7 * pairs + 0.3 / (1 + 10 * variance)
    coverage = 0.6 * mean + 0.4 * min(1.0, count / max(1, min(_ENOUGH, active)))
    return {
        "routing": _unit(max(scores)),
        "coherence": _unit(coherence),
        "coverage": _unit(coverage),
    }


def uncalibrated(parts: Mapping[str, float]) -> float:
    """`0.4 routing + 0.3 coherence + 0.3 coverage`: a score, not a probability."""
    return math.fsum(share * parts[name] for name, share in SHARES.items())


def confidence_features(
    nearest: Sequence[float],
    routed: Sequence[float],
    pairs: float,
    parts: Mapping[str, float],
    validation: float,
    kl: float,
) -> dict[str, float]:
    """The features of `confidence.FEATURES`.

    Args:
        nearest: scores of the nearest beliefs, best first, whether routed or not.
        routed: scores of those routed.
        pairs: see `mean_pair_score`.
        parts: see `components`.
        validation: probability of the best routed belief's answer when it was encoded.
        kl: KL(with || without) at the first token of the answer, nats.
    """
    best = nearest[0] if nearest else 0.0
    return {
        "best_similarity": best,
        "margin": best - nearest[1] if len(nearest) > 1 else best,
        "routed": float(len(routed)),
        "coherence": pairs if routed else 0.0,
        "coverage": parts["coverage"],
        "validation": validation,
        # A few nats and a hundred are both certain: the logarithm keeps one case from ruling.
        "first_token_kl": math.log1p(kl),
    }


def validation_record(report: Mapping[str, Any] | None) -> float:
    """The probability of the answer after encoding, from a belief's report; 0 without one."""
    log_p = (report or {}).get("answer_logprob_after")
    return _unit(math.exp(min(float(log_p), 0.0))) if log_p is not None else 0.0


def _unit(value: float) -> float:
    return min(1.0, max(0.0, value))
