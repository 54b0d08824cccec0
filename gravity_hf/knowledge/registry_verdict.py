"""What is refused, and how a refusal is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from .errors import (
    CapacityError,
    IncompatibleBaseError,
    InterferenceError,
    KnowledgeError,
    ValidationError,
)
from .registry_capacity import INPUT, SIDES

HASH, SHAPE, CAPACITY = "hash", "shape", "capacity"
ANGLE, LEAKAGE, VALIDATION = "angle", "leakage", "validation"


class Reason(NamedTuple):
    """Why a delta is refused: one of the kinds above, and a sentence."""

    kind: str
    message: str

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Limits:
    """What is refused.

    Args:
        angle_min: lowest score of the smallest principal angle (over pi / 2) to everything taken.
        leakage_max: highest leakage on the inputs of another delta.
        generic_max: highest leakage on unrelated text.
        output_side: whether the directions that are written must be apart too.
    """

    angle_min: float = 0.3
    leakage_max: float = 0.05
    generic_max: float = 0.05
    output_side: bool = False

    def __post_init__(self) -> None:
        for name in ("angle_min", "leakage_max", "generic_max"):
            value = getattr(self, name)
            top = 1.0 if name == "angle_min" else float("inf")
            if not 0 <= value <= top:
                raise ValidationError(
                    f"Registry: {name}: expected a number from 0 to {top:g}, got {value!r}"
                )

    @property
    def sides(self) -> tuple[str, ...]:
        return SIDES if self.output_side else (INPUT,)


@dataclass(frozen=True)
class RegistryVerdict:
    """What was measured, and what of it is refused.

    Args:
        reasons: none where the delta is accepted.
        conflicts: ids of the registered deltas whose directions it shares or whose inputs it
            would disturb.
        angles: map -> side -> score to all that is taken there; 1 is orthogonal.
        leakage: `"generic"` -> map -> leakage on unrelated text; `"on"` -> id -> map -> leakage on
            the inputs of that delta; `"from"` -> id -> map -> what that delta leaks on the inputs
            of this one.
        unmeasured: what could not be judged because nobody measured its inputs.
    """

    reasons: tuple[Reason, ...]
    conflicts: tuple[str, ...]
    angles: dict[str, dict[str, float]] = field(default_factory=dict)
    leakage: dict[str, Any] = field(default_factory=dict)
    unmeasured: tuple[str, ...] = ()

    @property
    def accepted(self) -> bool:
        return not self.reasons

    @property
    def kinds(self) -> set[str]:
        """Of the reasons."""
        return {reason.kind for reason in self.reasons}

    @property
    def score(self) -> float:
        """The lowest of `angles`; 1 where there is nothing to compare with."""
        return min((s for sides in self.angles.values() for s in sides.values()), default=1.0)

    def error(self) -> KnowledgeError:
        """The refusal as an exception: of the kind of the gravest reason, naming all."""
        text = "registry: the delta is refused: " + "; ".join(map(str, self.reasons))
        kinds = self.kinds
        if kinds & {HASH, SHAPE}:
            return IncompatibleBaseError(text)
        if CAPACITY in kinds:
            return CapacityError(text)
        if kinds & {ANGLE, LEAKAGE}:
            return InterferenceError(text, self.conflicts)
        return ValidationError(text)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "accepted": self.accepted,
            "reasons": [reason._asdict() for reason in self.reasons],
            "conflicts": list(self.conflicts),
            "angles": self.angles,
            "leakage": self.leakage,
            "unmeasured": list(self.unmeasured),
        }
