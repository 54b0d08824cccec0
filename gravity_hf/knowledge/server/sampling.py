"""How the next token is chosen from a row of logits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)


@dataclass(frozen=True)
class Sampling:
    """Settings of one text.

    Args:
        temperature: 0 takes the likeliest token.
        top_p: choose among the likeliest tokens that together have this probability.
        top_k: choose among that many; 0: all.
        seed: of the draws; the same gives the same text. None: a random one.
        presence_penalty, frequency_penalty: taken off the logit of a token that was written, once
            and as often as it was (OpenAI's definition).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0

    @property
    def is_plain(self) -> bool:
        """Whether the argmax of the logits themselves is the choice."""
        return self.temperature == 0.0 and not (self.presence_penalty or self.frequency_penalty)


class Chooser:
    """Chooses the tokens of one text; its draws are its own, whatever else is being written."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._warpers = _warpers(sampling)
        self._generator = torch.Generator()
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    def choose(self, logits: Tensor, written: Sequence[int]) -> int:
        """The next token after `written`, from its logits `[V]`."""
        if self.sampling.is_plain:
            return int(logits.argmax())
        scores = self._penalised(logits.float().cpu(), written)
        if self.sampling.temperature == 0.0:
            return int(scores.argmax())
        ids = torch.empty(1, 0, dtype=torch.long)
        weights = self._warpers(ids, scores[None]).softmax(-1)
        return int(torch.multinomial(weights[0], 1, generator=self._generator))

    def _penalised(self, scores: Tensor, written: Sequence[int]) -> Tensor:
        once, often = self.sampling.presence_penalty, self.sampling.frequency_penalty
        if not written or not (once or often):
            return scores
        counts = Counter(written)
        tokens = torch.tensor(list(counts))
        amounts = torch.tensor([once + often * count for count in counts.values()])
        return scores.index_add(0, tokens, -amounts)


def _warpers(sampling: Sampling) -> LogitsProcessorList:
    warpers = LogitsProcessorList()
    if sampling.temperature not in (0.0, 1.0):
        warpers.append(TemperatureLogitsWarper(sampling.temperature))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1.0:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    return warpers
