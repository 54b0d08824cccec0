"""How sure the answers of a store are: its beliefs' held-out prompts, answered and judged."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from typing import Any

import torch
from tqdm.auto import tqdm

from ..confidence import ConfidenceModel
from ..errors import ValidationError
from .calibrating import Calibration, calibrate_routing, queries
from .decoding import Decoder, Text
from .knowledge_base import KnowledgeBase
from .lanes import Caller

_ANSWER_TOKENS = 12


def calibrate_store(
    base: KnowledgeBase, *, precision: float = 0.95, most: int = 400, seed: int = 0
) -> Calibration:
    """Threshold and confidence from the store's own facts, as the server routes and answers.

    A query counts as right where it is about a belief and its greedy answer begins with that
    belief's answer; texts about no belief, near as they are, never count as right: the confidence
    is that a belief of the store answered rightly.

    Args:
        precision: of what is used, and of what is called certain, the share to be right.
        most: queries that are answered, known and unknown together; a sample by `seed`.

    Raises:
        ValidationError: fewer than ten held-out paraphrases or unrelated prompts.
    """
    encoder = base.selector.router.encoder
    routing = calibrate_routing(base.store, precision=precision, encoder=encoder)
    if routing is None:
        raise ValidationError(
            "calibrate: expected at least ten paraphrases that were not trained on and ten "
            "unrelated prompts among the store's facts, got fewer. Add facts with more of both"
        )
    base.selector.router.calibration = routing
    known, unknown = queries(base.store)
    cases = _sample([*known, *((text, None) for text in unknown)], most, seed)
    features, right = [], []
    for text, key in tqdm(cases, desc="calibrate", unit=" answers", disable=len(cases) < 50):
        found, is_right = _answered(base, text, key)
        features.append(found)
        right.append(is_right)
    confidence = None
    if min(sum(right), len(right) - sum(right)) >= 2:
        confidence = ConfidenceModel.fit(
            features, right, seed=seed, precision=precision, beliefs=routing.beliefs
        )
    return Calibration(routing, confidence, encoder)


def _answered(base: KnowledgeBase, text: str, key: str | None) -> tuple[dict[str, float], bool]:
    ids = base.tokenizer(text)["input_ids"]
    selection = base.selector.select(text, None, base.snapshot)
    found = base.selector.assess(selection, ids, base.snapshot)
    if key is None:
        return found.features, False
    answer = base.tokenizer.decode(_greedy(base, ids, selection.ids), skip_special_tokens=True)
    fact = base.snapshot.find(key).fact
    return found.features, fact is not None and fact.accepts(answer)


def _greedy(base: KnowledgeBase, ids: Sequence[int], beliefs: Sequence[str]) -> list[int]:
    """The likeliest tokens, by the loop that the server writes with."""
    text = Text(ids, _ANSWER_TOKENS, base.end_tokens, beliefs=beliefs)
    with closing(Decoder(Caller(base.model), base.bank.routed)) as decoder:
        text.take(decoder.start(text))
        while text.finish_reason is None:
            ((_, logits),) = decoder.step()
            if isinstance(logits, Exception):
                raise logits
            text.take(logits[0])
    return text.written


def _sample(cases: list[Any], most: int, seed: int) -> list[Any]:
    if len(cases) <= most:
        return cases
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(cases), generator=generator)[:most].sort().values
    return [cases[i] for i in chosen.tolist()]
