"""Whether knowledge and reasoning are kept apart: facts come from beliefs where one is needed, and
nothing is touched where none is.

Every prompt is answered four times by greedy decoding: by the base, with what the router chose,
with the right beliefs by name, and with all beliefs at once. What is judged is the text, where it
came from, and the confidence. A prompt that needs a fact and finds no belief counts as wrong, in
routing and in confidence, whatever its text.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch

from ..integration.placement import execution_device
from ..layers.modes import in_evaluation
from .confidence import ConfidenceModel
from .consolidation import facts_of
from .errors import ValidationError
from .fact_tokens import prompt_ids
from .provenance import Provenance, ProvenanceRecorder
from .routing import Router
from .separation_prompts import (
    CATEGORIES,
    SeparationPrompt,
    is_right,
    separation_prompts,
)
from .statistics import McNemar, Rate, mcnemar, rate


@dataclass(frozen=True)
class SeparationItem:
    """One prompt's outcome.

    Attributes:
        prompt, category, kind: what was asked.
        key: of the belief that it needs; None for none.
        sources: keys that it was routed to, best first; confidence, uncertain: see `Provenance`.
        texts: `base`, `routed`, `named` (the belief by name) and `all`: the continuations.
        right: of the same four, whether the text begins with the answer.
        routing_right: the belief that it needs is the first source; or none is, and none is needed.
        flag_right: routed rightly and not uncertain; or none is needed, and uncertain.
    """

    prompt: str
    category: str
    kind: str
    key: str | None
    sources: tuple[str, ...]
    confidence: float
    uncertain: bool
    texts: dict[str, str]
    right: dict[str, bool]
    routing_right: bool
    flag_right: bool


@dataclass(frozen=True)
class CategorySummary:
    """Of one category: shares of right texts for each way of answering, of right routing and right
    flags; `versus_base` pairs the routed texts with the base's; `unchanged`: routed texts that are
    those of the base, letter for letter; least, mean and largest confidence."""

    prompts: int
    right: dict[str, Rate]
    versus_base: McNemar
    routing: Rate
    flags: Rate
    activated: Rate
    unchanged: Rate
    confidence: tuple[float, float, float]


@dataclass(frozen=True)
class SeparationReport:
    """Outcome of every prompt, and of every category."""

    items: tuple[SeparationItem, ...]
    categories: dict[str, CategorySummary]
    routing: Rate
    flags: Rate

    def to_dict(self) -> dict[str, Any]:
        """For JSON: rates as objects with successes, trials, rate, low and high."""
        return {
            "per_item": [asdict(item) for item in self.items],
            "categories": {name: _plain(own) for name, own in self.categories.items()},
            "routing": self.routing._asdict(),
            "flags": self.flags._asdict(),
        }


def separation_benchmark(
    store: Any,
    router: Router,
    prompts: Sequence[SeparationPrompt] | None = None,
    *,
    calibration: ConfidenceModel | None = None,
    max_new_tokens: int = 12,
    batch_size: int = 8,
    limit: int | None = None,
    seed: int = 0,
) -> SeparationReport:
    """Answer all prompts in all four ways and judge them.

    Args:
        store: beliefs, `store.model` and `store.tokenizer`.
        router: calibrated, or with a threshold.
        prompts: None: `separation_prompts` of the store's facts, with prompts that no delta was
            trained on.
        calibration: of the confidence; without it the uncalibrated score is judged.
        batch_size: rows that are generated together.
        limit: of the store's facts, how many are asked about, drawn by `seed`; None: all.
        seed: of the prompts.

    Raises:
        ValidationError: too few facts, or a prompt about a fact that no belief stands for.
    """
    beliefs = [store.get(key) for key in sorted(store.keys())]
    owner = {fact.id: belief for belief in beliefs for fact in facts_of(belief)}
    if prompts is None:
        prompts = _default_prompts(beliefs, limit, seed)
    missing = [x.fact.id for x in prompts if x.fact is not None and x.fact.id not in owner]
    if missing:
        raise ValidationError(
            f"separation_benchmark: expected prompts about facts of the store, got {missing[0]!r}"
        )
    needed = [owner[x.fact.id] if x.fact is not None else None for x in prompts]
    recorder = ProvenanceRecorder(store, None, router, calibration)
    answering = _Answering(store, recorder, max_new_tokens)
    items: list[SeparationItem] = []
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        items += answering.items(prompts[part], needed[part], [b.id for b in beliefs])
    return _report(items)


def _default_prompts(
    beliefs: Sequence[Any], limit: int | None, seed: int
) -> list[SeparationPrompt]:
    facts = [fact for belief in beliefs for fact in facts_of(belief)]
    if limit is not None and limit < len(facts):
        order = torch.randperm(len(facts), generator=torch.Generator().manual_seed(seed)).tolist()
        facts = [facts[i] for i in sorted(order[:limit])]
    trained = [
        text for belief in beliefs for text in (belief.report or {}).get("training_prompts", [])
    ]
    return separation_prompts(facts, trained=trained, seed=seed)


class _Answering:
    """Greedy continuations of a few prompts, in all four ways."""

    def __init__(self, store: Any, recorder: ProvenanceRecorder, max_new_tokens: int) -> None:
        self.store, self.recorder, self.max_new_tokens = store, recorder, max_new_tokens

    def items(
        self,
        prompts: Sequence[SeparationPrompt],
        needed: Sequence[Any],
        everything: list[str],
    ) -> list[SeparationItem]:
        texts = [x.text for x in prompts]
        bank = self.recorder.bank
        named = [[] if belief is None else [belief.id] for belief in needed]
        answers = {
            "base": self.continuations(texts, nullcontext()),
            "named": self.continuations(texts, bank.routed(named)),
            "all": self.continuations(texts, bank.routed([everything] * len(texts))),
        }
        answers["routed"] = self.continuations(
            texts, self.recorder.routed(texts), self.recorder.processor
        )
        sources = self.recorder.results
        return [
            _item(prompt, belief, found, {name: own[i] for name, own in answers.items()})
            for i, (prompt, belief, found) in enumerate(zip(prompts, needed, sources, strict=True))
        ]

    def continuations(
        self,
        texts: Sequence[str],
        context: AbstractContextManager[Any],
        processor: Any = None,
    ) -> list[str]:
        """Greedy, one line each."""
        model, tokenizer = self.store.model, self.store.tokenizer
        rows = [prompt_ids(tokenizer, text) for text in texts]
        width = max(map(len, rows))
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        device = execution_device(model) or torch.device("cpu")
        ids, mask = ids.to(device), mask.to(device)
        with context, in_evaluation(model), torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=self.max_new_tokens,
                do_sample=False,
                num_beams=1,
                pad_token_id=pad,
                logits_processor=[processor(mask)] if processor is not None else [],
            )
        return [tokenizer.decode(row[width:], skip_special_tokens=True) for row in out]


def _item(
    prompt: SeparationPrompt, belief: Any, found: Provenance, texts: dict[str, str]
) -> SeparationItem:
    sources = tuple(source.key for source in found.sources)
    if belief is None:
        routing_right, flag_right = not sources, found.uncertain
    else:
        routing_right = sources[:1] == (belief.key,)
        flag_right = routing_right and not found.uncertain
    return SeparationItem(
        prompt=prompt.text,
        category=prompt.category,
        kind=prompt.kind,
        key=None if belief is None else belief.key,
        sources=sources,
        confidence=found.confidence,
        uncertain=found.uncertain,
        texts=texts,
        right={name: is_right(text, prompt) for name, text in texts.items()},
        routing_right=routing_right,
        flag_right=flag_right,
    )


def _report(items: Sequence[SeparationItem]) -> SeparationReport:
    by_category = {name: [x for x in items if x.category == name] for name in CATEGORIES}
    return SeparationReport(
        items=tuple(items),
        categories={name: _summary(own) for name, own in by_category.items() if own},
        routing=rate(x.routing_right for x in items),
        flags=rate(x.flag_right for x in items),
    )


def _summary(items: Sequence[SeparationItem]) -> CategorySummary:
    confidences = [x.confidence for x in items]
    return CategorySummary(
        prompts=len(items),
        right={name: rate(x.right[name] for x in items) for name in items[0].right},
        versus_base=mcnemar([x.right["routed"] for x in items], [x.right["base"] for x in items]),
        routing=rate(x.routing_right for x in items),
        flags=rate(x.flag_right for x in items),
        activated=rate(bool(x.sources) for x in items),
        unchanged=rate(x.texts["routed"] == x.texts["base"] for x in items),
        confidence=(min(confidences), sum(confidences) / len(confidences), max(confidences)),
    )


def _plain(summary: CategorySummary) -> dict[str, Any]:
    return {
        "prompts": summary.prompts,
        "right": {name: own._asdict() for name, own in summary.right.items()},
        "versus_base": summary.versus_base._asdict(),
        "routing": summary.routing._asdict(),
        "flags": summary.flags._asdict(),
        "activated": summary.activated._asdict(),
        "unchanged": summary.unchanged._asdict(),
        "confidence": list(summary.confidence),
    }
