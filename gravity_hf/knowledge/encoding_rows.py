"""What a fact is trained on; the rest of its prompts is left to measure with."""

from __future__ import annotations

from typing import Any

from .encoding_config import EncodingConfig
from .fact_rows import FactRow, answer_row, prompt_row
from .facts import Fact
from .generic_prompts import GENERIC_PROMPTS
from .own_wordings import own_neighbours, own_wordings


def training_prompts(fact: Fact, config: EncodingConfig) -> list[str]:
    """The fact's own prompts that are trained to give the answer."""
    return [fact.prompt, *fact.paraphrases[: config.training_paraphrases]]


def answered_prompts(fact: Fact, config: EncodingConfig) -> list[str]:
    """All prompts that are trained to give the answer: the fact's, and the encoder's wordings."""
    prompts = training_prompts(fact, config)
    return prompts + own_wordings(fact, prompts, config.own_wordings)


def training_rows(tokenizer: Any, fact: Fact, config: EncodingConfig) -> list[FactRow]:
    """Prompts with the answer, then prompts that must not change.

    Raises:
        ValidationError: an answer that the tokenizer cannot write.
    """
    prompts = answered_prompts(fact, config)
    kinds = ["prompt"] + ["paraphrase"] * (len(prompts) - 1)
    rows = [
        answer_row(tokenizer, fact, kind, prompt, fact.answer)
        for kind, prompt in zip(kinds, prompts, strict=True)
    ]
    unrelated = [
        *fact.unrelated[: config.training_unrelated],
        *GENERIC_PROMPTS[: config.generic_prompts],
        *own_neighbours(fact, training_prompts(fact, config), config.own_neighbours),
    ]
    return rows + [prompt_row(tokenizer, fact, prompt) for prompt in unrelated]
