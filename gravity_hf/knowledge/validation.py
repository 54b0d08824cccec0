"""What a delta has to show before it counts: answers on prompts it has not seen, and restraint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .errors import ValidationError
from .facts import Fact

_MEANS = (
    *("top1", "exact", "paraphrase_top1", "kl_unrelated"),
    *("top1_before", "paraphrase_top1_before"),
)
PARAPHRASE, NOTHING = "paraphrase", "nothing"


@dataclass(frozen=True)
class Validation:
    """The bar.

    Args:
        min_top1: share of a delta's facts whose answer's first token comes first, after the prompt
            itself; and, with `holdout`, the mean share of held-out paraphrases too.
        max_kl: mean KL without and with the delta, in nats, at prompts that must not change and
            that it was not trained on.
        holdout: `"paraphrase"`: the paraphrases that were not trained on are judged. `"nothing"`:
            only prompts that were, which says nothing about prompts that were not.
        max_kl_others: mean KL, in nats, at the prompts of other deltas of the same run or store
            when this one is on too, uncalled for. None: it is measured and not judged.

    Raises:
        ValidationError: numbers that mean nothing, or another word.
    """

    min_top1: float = 0.8
    max_kl: float = 0.05
    holdout: str = PARAPHRASE
    max_kl_others: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.min_top1 <= 1:
            raise ValidationError(
                f"Validation.min_top1: expected a share from 0 to 1, got {self.min_top1!r}"
            )
        for name in ("max_kl", "max_kl_others"):
            value = getattr(self, name)
            if value is not None and not value >= 0:
                raise ValidationError(
                    f"Validation.{name}: expected nats of at least 0, got {value!r}"
                )
        if self.holdout not in (PARAPHRASE, NOTHING):
            raise ValidationError(
                f"Validation.holdout: expected {PARAPHRASE!r} or {NOTHING!r}, got {self.holdout!r}"
            )

    def check_facts(
        self, facts: Sequence[Fact], trained_paraphrases: int, trained_unrelated: int
    ) -> None:
        """Raise ValidationError, naming facts, unless each leaves something to judge by."""
        wanted = {"unrelated": trained_unrelated}
        if self.holdout == PARAPHRASE:
            wanted["paraphrases"] = trained_paraphrases
        for name, trained in wanted.items():
            short = [fact.id for fact in facts if len(getattr(fact, name)) <= trained]
            if short:
                raise ValidationError(
                    f"validation: expected more than {trained} {name} of every fact, as many as "
                    f"are trained on, got no more for {len(short)} of {len(facts)}, such as "
                    f"{short[0]}. Add some, or train on fewer"
                )

    def summary(self, measures: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Means over the facts of a delta, for JSON.

        Args:
            measures: of `evaluate_facts`, or the reports of a BeliefEncoder.
        """
        found = {key: [m[key] for m in measures if m.get(key) is not None] for key in _MEANS}
        means = {key: sum(own) / len(own) for key, own in found.items() if own}
        return {"facts": len(measures), **means}

    def failures(self, summary: Mapping[str, Any]) -> list[str]:
        """What of a `summary` is below the bar, in words; nothing where all is well."""
        judged = {"top1": "prompts"}
        if self.holdout == PARAPHRASE:
            judged["paraphrase_top1"] = "held-out paraphrases"
        found = [
            f"expected the answer first after at least {self.min_top1:.0%} of {words}, got "
            f"{summary.get(key, 0.0):.0%}"
            for key, words in judged.items()
            if summary.get(key, 0.0) < self.min_top1
        ]
        limits = {"kl_unrelated": (self.max_kl, "prompts that must not change")}
        if self.max_kl_others is not None:
            limits["kl_others"] = (self.max_kl_others, "prompts of other deltas")
        for key, (limit, words) in limits.items():
            if key in summary and not summary[key] <= limit:
                found.append(
                    f"expected a mean KL of at most {limit:g} nats at {words}, got "
                    f"{summary[key]:.3g}"
                )
        return found
