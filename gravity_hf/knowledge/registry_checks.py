"""Whether a delta may join others, and if not, why: every reason, with what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from .delta import LowRankDelta
from .errors import IncompatibleBaseError, UnsafeFileError
from .leakage import Moments, delta_leakage
from .registry_capacity import SIDES, Occupied
from .registry_member import Member, delta_spans
from .registry_verdict import ANGLE, CAPACITY, LEAKAGE, SHAPE, Limits, Reason, RegistryVerdict
from .subspaces import Basis, Spans, orthonormal_score


def shape_reasons(delta: LowRankDelta, model: nn.Module) -> list[Reason]:
    """That the delta does not fit the model, or is not finite."""
    try:
        delta.check(model)
    except (IncompatibleBaseError, UnsafeFileError) as error:
        return [Reason(SHAPE, str(error))]
    return []


def judged(
    delta: LowRankDelta,
    moments: Moments,
    members: Sequence[Member],
    occupied: Occupied,
    generic: Moments,
    limits: Limits,
) -> RegistryVerdict:
    """Whether a delta whose maps fit the base may join.

    Args:
        moments: of its own prompts.
        members, occupied: what is registered, and what that takes.
        generic: moments of unrelated text.
    """
    spans = delta_spans(delta)
    full = _capacity_reasons(spans, occupied, limits)
    scores = _angle_scores(spans, occupied, limits)
    shared, near = _angle_reasons(spans, scores, members, limits)
    leakage = _measured_leakage(delta, moments, members, generic)
    leaks, disturbed = _leakage_reasons(leakage, limits)
    return RegistryVerdict(
        (*full, *shared, *leaks),
        tuple(dict.fromkeys((*near, *disturbed))),
        scores,
        leakage,
        _unmeasured(delta, moments, members, generic),
    )


def _capacity_reasons(
    spans: Mapping[str, Spans], occupied: Occupied, limits: Limits
) -> list[Reason]:
    """That a map has fewer directions left than the delta wants."""
    reasons = []
    for name, sides in spans.items():
        for side in limits.sides:
            basis = occupied.basis(name, side)
            wanted = sides[SIDES.index(side)].shape[1]
            if wanted > basis.free:
                reasons.append(
                    Reason(
                        CAPACITY,
                        f"{name}: expected at most {basis.free} {side} directions, which is what "
                        f"{basis.rank} of {basis.dim} taken leave, got {wanted}. Lower the rank, "
                        "use other layers, or consolidate",
                    )
                )
    return reasons


def _angle_scores(
    spans: Mapping[str, Spans], occupied: Occupied, limits: Limits
) -> dict[str, dict[str, float]]:
    """Map -> side -> score to all that is taken there."""
    return {
        name: {
            side: orthonormal_score(sides[SIDES.index(side)], occupied.basis(name, side).columns)
            for side in limits.sides
        }
        for name, sides in spans.items()
    }


def _angle_conflicts(
    spans: Mapping[str, Spans], members: Sequence[Member], name: str, side: str, floor: float
) -> list[str]:
    """Ids of members whose directions the delta shares at one map, nearest first.

    Where each of them by itself is far enough away, as many of the nearest as are too near
    together.
    """
    at = SIDES.index(side)
    near = [m for m in members if name in m.spans]
    scores = {m.id: orthonormal_score(spans[name][at], m.spans[name][at]) for m in near}
    near.sort(key=lambda m: scores[m.id])
    found = [m.id for m in near if scores[m.id] < floor]
    if found:
        return found
    together = Basis(len(spans[name][at]))
    for count, member in enumerate(near, 1):
        together = together.extended(member.spans[name][at])
        if orthonormal_score(spans[name][at], together.columns) < floor:
            return [m.id for m in near[:count]]
    return []


def _angle_reasons(
    spans: Mapping[str, Spans],
    scores: Mapping[str, Mapping[str, float]],
    members: Sequence[Member],
    limits: Limits,
) -> tuple[list[Reason], list[str]]:
    """Maps where the delta shares directions with others, and whose they are."""
    reasons, conflicts = [], []
    for name, sides in scores.items():
        for side, score in sides.items():
            if score >= limits.angle_min:
                continue
            own = _angle_conflicts(spans, members, name, side, limits.angle_min)
            conflicts += own
            reasons.append(
                Reason(
                    ANGLE,
                    f"{name}: expected an angle score of at least {limits.angle_min:g} on the "
                    f"{side} side, got {score:.3f} to {_named(own)}. Train it against the "
                    "registry's projector",
                )
            )
    return reasons, conflicts


def _measured_leakage(
    delta: LowRankDelta, moments: Moments, members: Sequence[Member], generic: Moments
) -> dict[str, Any]:
    """The three kinds of `RegistryVerdict.leakage`."""
    on = {m.id: found for m in members if (found := delta_leakage(delta, m.moments))}
    back = {m.id: found for m in members if (found := delta_leakage(m.delta, moments))}
    return {"generic": delta_leakage(delta, generic), "on": on, "from": back}


def _leakage_reasons(leakage: Mapping[str, Any], limits: Limits) -> tuple[list[Reason], list[str]]:
    """Maps where too much is added to inputs that are not the delta's, and to whose.

    What registered deltas add to the inputs of the new one is measured and not judged: no training
    of the new one can change it.
    """
    reasons, conflicts = [], []
    worst = _worst(leakage["generic"])
    if worst is not None and worst[1] > limits.generic_max:
        reasons.append(
            Reason(
                LEAKAGE,
                f"{worst[0]}: expected a leakage on unrelated text of at most "
                f"{limits.generic_max:g}, got {worst[1]:.3f}. Train it in the null space, or with "
                "a higher norm penalty",
            )
        )
    for belief_id, found in leakage["on"].items():
        worst = _worst(found)
        if worst is not None and worst[1] > limits.leakage_max:
            conflicts.append(belief_id)
            reasons.append(
                Reason(
                    LEAKAGE,
                    f"{worst[0]}: expected a leakage on the inputs of {belief_id} of at most "
                    f"{limits.leakage_max:g}, got {worst[1]:.3f}. Train it in the null space",
                )
            )
    return reasons, conflicts


def _unmeasured(
    delta: LowRankDelta, moments: Moments, members: Sequence[Member], generic: Moments
) -> tuple[str, ...]:
    found = []
    if any(name not in generic for name in delta.factors):
        found.append("leakage on unrelated text: see measure_generic")
    if members and not moments:
        found.append("leakage onto the delta's own prompts: pass moments")
    silent = [m.id for m in members if not m.moments]
    if silent:
        found.append(f"leakage on the prompts of {_named(silent)}: registered without")
    return tuple(found)


def _worst(found: Mapping[str, float]) -> tuple[str, float] | None:
    return max(found.items(), key=lambda item: item[1], default=None)


def _named(ids: Sequence[str], shown: int = 5) -> str:
    more = f" and {len(ids) - shown} more" if len(ids) > shown else ""
    return (", ".join(ids[:shown]) or "what is registered") + more
