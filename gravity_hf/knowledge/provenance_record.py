"""What is kept of one answer: its sources, what they did, and how far to trust it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .attribution import TokenEffect
from .bank import DeltaBank
from .components import (
    UNCERTAIN_BELOW,
    components,
    confidence_features,
    mean_pair_score,
    uncalibrated,
    validation_record,
)
from .confidence import ConfidenceModel
from .recording import RowPlan


@dataclass(frozen=True)
class Source:
    """A belief that was active for an answer.

    Attributes:
        id, key, version: of the belief.
        score: of the router; 1 for one that was asked for by name.
        kl: what leaving it out does to the first token, KL in nats.
        changes_token: whether the likeliest first token is another one without it.
    """

    id: str
    key: str
    version: int
    score: float
    kl: float
    changes_token: bool


@dataclass(frozen=True)
class Provenance:
    """Of one answer.

    Attributes:
        confidence: chance that a belief of the store answered rightly, if `calibrated`; else a
            score in [0, 1] without that meaning. 0 without sources.
        uncertain: whether it is below the threshold.
        calibrated: whether a confidence model was there.
        stale: whether the store changed by more than a tenth since that was fitted.
        abstained: whether the row was stopped for its low confidence.
        sources: the active beliefs, best first.
        components: routing strength, coherence and coverage, each in [0, 1].
        features: what the confidence is computed from.
        per_token: effects on the tokens that were looked at; the first one always is.
    """

    confidence: float
    uncertain: bool
    calibrated: bool
    stale: bool
    abstained: bool
    sources: tuple[Source, ...]
    components: dict[str, float]
    features: dict[str, float]
    per_token: tuple[TokenEffect, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def provenance_of(
    plan: RowPlan,
    effects: Sequence[TokenEffect],
    beliefs: Mapping[str, Any],
    bank: DeltaBank,
    calibration: ConfidenceModel | None,
    *,
    active: int,
    versions: Sequence[str],
    abstained: bool = False,
) -> Provenance:
    """Put together what is known of one answer.

    Args:
        plan: its beliefs and their scores.
        effects: of its tokens, the first one first; empty where none was looked at.
        beliefs: by id, at least the plan's.
        bank: has their deltas; not read where `plan.pairs` is known.
        calibration: None: the confidence is not calibrated.
        active: beliefs in the store.
        versions: `<id>-v<version>` of those.
        abstained: whether the answer was stopped.
    """
    first = effects[0] if effects else None
    pairs = plan.pairs
    if pairs is None:
        pairs = mean_pair_score([bank[belief] for belief in plan.ids])
    parts = components(plan.scores, pairs, active)
    best = beliefs[plan.ids[0]] if plan.ids else None
    features = confidence_features(
        plan.nearest,
        plan.scores,
        pairs,
        parts,
        validation_record(best.report if best else None),
        first.kl if first else 0.0,
    )
    confidence, threshold, stale = uncalibrated(parts), UNCERTAIN_BELOW, False
    if calibration is not None:
        # Without a source no belief answered, whatever the model makes of the rest.
        confidence = calibration.predict(features) if plan.ids else 0.0
        threshold, stale = calibration.point.threshold, calibration.is_stale(versions)
    return Provenance(
        confidence=confidence,
        uncertain=confidence < threshold,
        calibrated=calibration is not None,
        stale=stale,
        abstained=abstained,
        sources=_sources(plan, beliefs, first),
        components=parts,
        features=features,
        per_token=tuple(effects),
    )


def _sources(
    plan: RowPlan, beliefs: Mapping[str, Any], first: TokenEffect | None
) -> tuple[Source, ...]:
    effects = {effect.id: effect for effect in first.sources} if first else {}
    sources = []
    for belief_id, score in zip(plan.ids, plan.scores, strict=True):
        belief, effect = beliefs[belief_id], effects.get(belief_id)
        kl, changes = (effect.kl, effect.changes_token) if effect else (0.0, False)
        sources.append(Source(belief_id, belief.key, belief.version, score, kl, changes))
    return tuple(sources)
