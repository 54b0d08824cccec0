"""A confidence model from a store's own queries: answered, judged, and fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..integration.placement import execution_device
from ..layers.modes import in_evaluation
from .confidence import ConfidenceModel
from .consolidation import facts_of
from .errors import ValidationError
from .fact_tokens import prompt_ids
from .provenance import ProvenanceRecorder
from .targets import base_model


@dataclass(frozen=True)
class ConfidenceCase:
    """One answered query.

    Attributes:
        text: of the query; key: the belief it is about, None for one about no belief.
        answer: what greedy decoding gave, with what the router chose.
        right: whether that is an answer of the belief; never for a query about none.
        features: see `confidence.FEATURES`.
        sources: keys of the beliefs that were active.
    """

    text: str
    key: str | None
    answer: str
    right: bool
    features: dict[str, float]
    sources: tuple[str, ...]


def confidence_cases(
    recorder: ProvenanceRecorder,
    known: Sequence[tuple[str, str]],
    unknown: Sequence[str],
    *,
    max_new_tokens: int = 8,
    batch_size: int = 16,
) -> list[ConfidenceCase]:
    """Answer queries as the store would, and judge the answers.

    Args:
        recorder: with a router.
        known: texts with the key of the belief they are about, that were neither trained on nor
            indexed.
        unknown: texts about no belief of the store.
        max_new_tokens: of an answer; enough for the longest that counts.
        batch_size: queries answered together.

    Raises:
        UnknownKeyError: a key that the store does not have.
    """
    facts = {key: facts_of(recorder.store.get(key)) for key in {key for _, key in known}}
    queries = [*known, *((text, None) for text in unknown)]
    cases = []
    for start in range(0, len(queries), batch_size):
        part = queries[start : start + batch_size]
        answers = _answers(recorder, [text for text, _ in part], max_new_tokens)
        for (text, key), answer, found in zip(part, answers, recorder.results, strict=True):
            right = key is not None and any(fact.accepts(answer) for fact in facts[key])
            keys = tuple(source.key for source in found.sources)
            cases.append(ConfidenceCase(text, key, answer, right, found.features, keys))
    return cases


def fit_confidence(
    recorder: ProvenanceRecorder,
    cases: Sequence[ConfidenceCase],
    *,
    seed: int = 0,
    precision: float = 0.95,
) -> ConfidenceModel:
    """Fit to the cases in which a belief was active: without one the confidence is 0 anyway.

    Args:
        recorder: whose store the cases are of.
        cases: see `confidence_cases`; some hundreds.
        seed, precision: see `ConfidenceModel.fit`.
    """
    used = [case for case in cases if case.sources]
    if not used:
        raise ValidationError(
            "fit_confidence: expected cases with sources, got none. The router's threshold lets "
            "nothing through"
        )
    beliefs = map(recorder.store.get, recorder.store.keys())
    return ConfidenceModel.fit(
        [case.features for case in used],
        [case.right for case in used],
        seed=seed,
        precision=precision,
        beliefs=[f"{belief.id}-v{belief.version}" for belief in beliefs],
    )


def _answers(recorder: ProvenanceRecorder, texts: Sequence[str], new: int) -> list[str]:
    """Greedy continuations, padded on the left."""
    tokenizer, model = recorder.store.tokenizer, base_model(recorder.store.model)
    rows = [prompt_ids(tokenizer, text) for text in texts]
    width = max(map(len, rows))
    pad = next(x for x in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if x is not None)
    device = execution_device(model)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    generate: Any = model.generate
    with recorder.routed(texts), in_evaluation(model), torch.no_grad():
        out = generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad,
            logits_processor=[recorder.processor(mask)],
        )
    return [tokenizer.decode(row[width:], skip_special_tokens=True) for row in out]
