"""What each source did to an answer: logits with all of them, with none, and without each."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..integration.placement import execution_device
from .bank import DeltaBank
from .errors import ValidationError


@dataclass(frozen=True)
class SourceEffect:
    """What leaving out one source does to the next token's distribution.

    Attributes:
        id: of the belief.
        kl: KL(all sources || all but this one), nats.
        changes_token: whether the likeliest token is another one without it.
    """

    id: str
    kl: float
    changes_token: bool


@dataclass(frozen=True)
class TokenEffect:
    """What the sources of a row do to one token of its answer.

    Attributes:
        step: number of the token, 0 for the first of the answer.
        kl: KL(all sources || none), nats.
        token, token_without: the likeliest with all sources and with none.
        sources: of each source, in the order of their ids.
    """

    step: int
    kl: float
    token: int
    token_without: int
    sources: tuple[SourceEffect, ...]


class Attribution:
    """Runs one row of a batch with and without its sources, in step with its generation.

    The row is run without padding, beside nothing but its own variants, with a cache of its own:
    what comes out depends neither on the batch nor does it touch the cache that generates.

    Args:
        model: the causal LM that `bank` is for.
        bank: has the deltas of all sources.
        sources: ids of the row's beliefs, at least one.
    """

    def __init__(self, model: Any, bank: DeltaBank, sources: Sequence[str]) -> None:
        if not sources:
            raise ValidationError("Attribution: expected at least one source, got none")
        self._model, self._bank = model, bank
        self.sources = tuple(sorted(sources))
        self._variants = [list(self.sources), []]
        # Without its only source a row has none: that is computed already.
        if len(self.sources) > 1:
            self._variants += [[s for s in self.sources if s != left] for left in self.sources]
        self._read: list[int] = []
        self._cache: Any = None
        # Logits of the prompt's other tokens are not worth a matrix over the vocabulary.
        takes = inspect.signature(model.forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        # transformers 5.24 renames it, in arguments and outputs.
        self._cache_name = "cache" if "cache" in takes else "past_key_values"

    def effect(self, tokens: Sequence[int], step: int) -> TokenEffect:
        """What the sources do to the token after `tokens`, the row's ids without padding."""
        log_p = self.logits(tokens).float().log_softmax(-1)
        best = log_p.argmax(-1).tolist()
        left_out = range(2, 2 + len(self.sources)) if len(self.sources) > 1 else [1]
        effects = tuple(
            SourceEffect(source, _kl(log_p[0], log_p[row]), best[row] != best[0])
            for source, row in zip(self.sources, left_out, strict=True)
        )
        return TokenEffect(step, _kl(log_p[0], log_p[1]), best[0], best[1], effects)

    @torch.no_grad()
    def logits(self, tokens: Sequence[int]) -> Tensor:
        """Of the token after `tokens`, `[variants, vocabulary]`: with all sources, with none, and,
        of several sources, without each of them in the order of `sources`."""
        tokens = list(tokens)
        known = len(self._read)
        if self._cache is None or tokens[:known] != self._read or known == len(tokens):
            # Another sequence, as after beams changed places: read it from its start.
            self._cache, known = None, 0
        new = torch.tensor(tokens[known:], device=execution_device(self._model))
        new = new.expand(len(self._variants), -1)
        with self._bank.routed(self._variants):
            given = {self._cache_name: self._cache, **self._options}
            result = self._model(input_ids=new, use_cache=True, **given)
        self._cache, self._read = getattr(result, self._cache_name, None), tokens
        return result.logits[:, -1]


def _kl(log_p: Tensor, log_q: Tensor) -> float:
    """KL(p || q) in nats, of log-probabilities `[vocabulary]`; never below 0 by rounding."""
    p, q = log_p.double(), log_q.double()
    # A token ruled out by both adds nothing; inf - inf would be NaN.
    terms = torch.where(p.isneginf(), 0.0, p.exp() * (p - q))
    return max(0.0, float(terms.sum()))
