"""A belief of a store in packed codes: the next version of its key, measured before it counts."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from .bank import DeltaBank
from .consolidation import require_unchanged
from .errors import ValidationError
from .fact_metrics import evaluate_facts
from .facts import Fact
from .quantized_delta import PrecisionReport, Tier
from .quantizing import Quantized, quantize

# What the coded delta is measured by; it takes the place of what the encoder found.
_MEASURED = ("top1", "top5", "exact", "paraphrase_top1", "paraphrase_exact", "kl_unrelated")


def quantize_belief(
    store: Any,
    key: str,
    tier: int | Tier = 1,
    *,
    registry: Any = None,
    keep_answer: bool = True,
    **settings: Any,
) -> PrecisionReport:
    """Put a coded delta in force for `key`, as its next version, or change nothing.

    The file of the new version holds the codes in the place of the factors, beside what the store
    keeps of the fact; reading it checks the tier again. `store.rollback` brings the exact delta
    back.

    Args:
        store: a BeliefStore.
        registry: the store's Registry: the deltas in it are those that the coded one is to stay
            apart from, and it knows the new version in the place of the old one.
        keep_answer: refuse where the fact is answered exactly by the exact delta and no longer by
            the coded one.
        **settings: see `quantize`.

    Raises:
        UnknownKeyError: not in force.
        QuantizationError: no width meets the tier.
        ValidationError: the answer would be lost.
        InterferenceError: the registry refuses the coded delta.
    """
    belief = store.get(key)
    if registry is not None and "others" not in settings:
        ids = [i for i in registry.ids if i != belief.id]
        settings["others"] = [registry[i].delta for i in ids]
    coded = quantize(belief.delta, tier, **settings)
    report = {**belief.report, "precision": coded.report.to_dict()}
    if belief.fact is not None:
        report.update(_measured(store, belief, belief.fact, coded, keep_answer))
    used = coded.delta.dequantize()
    with ExitStack() as stack:
        if registry is not None:
            stack.enter_context(registry.transaction())
        stack.enter_context(store.transaction())
        require_unchanged(store, [belief])
        new = store.update_delta(key, used, belief.metadata, belief.fact, report, quantized=coded)
        if registry is not None and belief.id in registry:
            moments = registry[belief.id].moments
            registry.unregister(belief.id)
            registry.register(new.id, used, moments)
            registry.save()
    return coded.report


def _measured(
    store: Any, belief: Any, fact: Fact, coded: Quantized, keep_answer: bool
) -> dict[str, Any]:
    bank = DeltaBank(store.model)
    bank.add("exact", belief.delta)
    bank.add("coded", coded.delta.dequantize())
    trained = set(belief.report.get("training_prompts", ()))

    def measured(name: str) -> dict[str, Any]:
        return evaluate_facts(
            store.model,
            store.tokenizer,
            [fact],
            lambda rows: bank.routed([[name]] * len(rows)),
            trained_paraphrases=sum(text in trained for text in fact.paraphrases),
        )[0]

    before, after = measured("exact"), measured("coded")
    if keep_answer and before["exact"] and not after["exact"]:
        raise ValidationError(
            f"quantize: expected {belief.key!r} to answer {fact.answer!r} with "
            f"{coded.report.bits} bits as it did before, got another answer. Nothing was changed; "
            "take a tier with a lower ceiling"
        )
    return {name: after[name] for name in _MEASURED}
