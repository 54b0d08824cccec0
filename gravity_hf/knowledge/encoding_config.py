"""How facts are made into deltas."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from .errors import ValidationError


@dataclass(frozen=True)
class EncodingConfig:
    """Settings of `BeliefEncoder`; the defaults come from a few trials on SmolLM2-135M.

    Args:
        rank: of the update of each map.
        layers: `"third"`, `"middle"`, `"all"` or numbers of decoder layers; see `target_modules`.
        targets: last parts of the maps' names.
        steps: of training, at most.
        learning_rate: of Adam, as a share of the sizes: 0.1 would change what a map gives at the
            subject by a tenth in a step, in models of any scale.
        locality: weight of `KL(base || with delta)` on unrelated prompts.
        norm_penalty: weight of `|BA|_F^2`.
        margin: stop a delta once every token of its answers leads all others by so much, in nats,
            on every prompt that it is trained on.
        training_paraphrases: so many of a fact's first paraphrases are trained on; the others are
            left to measure with.
        training_unrelated: the same of its unrelated prompts.
        generic_prompts: everyday prompts added to the unrelated ones.
        own_wordings: so many more wordings of its prompts are trained on, made by the encoder; 0
            takes a quarter of the time, and teaches a sentence more than a fact.
        own_neighbours: so many prompts of the encoder's own, about other subjects and about the
            same one, are added to the unrelated ones.
        seed: of the initial factors.
        budget_fraction: of the base's parameters that a fact may cost.
        batch_facts: trained at once: more are faster, and take more memory.
        gradient_checkpointing: compute layers again in the backward pass instead of storing them.
    """

    rank: int = 2
    layers: str | tuple[int, ...] = "third"
    targets: tuple[str, ...] = ("down_proj",)
    steps: int = 60
    learning_rate: float = 3e-2
    locality: float = 6.0
    norm_penalty: float = 0.0
    margin: float = 2.0
    training_paraphrases: int = 1
    training_unrelated: int = 1
    generic_prompts: int = 2
    own_wordings: int = 8
    own_neighbours: int = 12
    seed: int = 0
    budget_fraction: float = 2e-4
    batch_facts: int = 4
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("layers", "targets"):
            value = getattr(self, name)
            if isinstance(value, Sequence) and not isinstance(value, str):
                object.__setattr__(self, name, tuple(value))
        for name in ("rank", "steps", "batch_facts"):
            self._require(name, 1, whole=True)
        for name in ("training_paraphrases", "training_unrelated", "generic_prompts"):
            self._require(name, 0, whole=True)
        for name in ("own_wordings", "own_neighbours", "seed"):
            self._require(name, 0, whole=True)
        for name in ("locality", "norm_penalty"):
            self._require(name, 0)
        for name in ("learning_rate", "budget_fraction", "margin"):
            self._require(name, 0)
            if not getattr(self, name):
                raise ValidationError(f"EncodingConfig.{name}: expected a positive number, got 0")

    def _require(self, name: str, least: int, *, whole: bool = False) -> None:
        value = getattr(self, name)
        kinds = int if whole else (int, float)
        if (
            isinstance(value, bool)
            or not isinstance(value, kinds)
            or not math.isfinite(value)
            or value < least
        ):
            raise ValidationError(
                f"EncodingConfig.{name}: expected {'an integer' if whole else 'a number'} of at "
                f"least {least}, got {value!r}"
            )

    def with_changes(self, **changes: Any) -> EncodingConfig:
        """The same with some settings changed. ValidationError for an unknown name."""
        known = {field.name for field in fields(self)}
        if unknown := sorted(set(changes) - known):
            raise ValidationError(
                f"EncodingConfig: expected settings named {', '.join(sorted(known))}, got "
                f"{unknown[0]!r}"
            )
        return replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EncodingConfig:
        """The inverse of `to_dict`. ValidationError for an unknown name."""
        return cls().with_changes(**values)
