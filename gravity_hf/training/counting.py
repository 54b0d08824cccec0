"""Unigram and bigram models of text: what a language model has to beat to have learnt more than
which tokens are frequent, and which follow which."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

ORDERS = {1: "unigram", 2: "bigram"}
# Of these, the constant that is best on the last part of the training text is taken.
CONSTANTS = tuple(10.0**power for power in range(-4, 3))
_HELD_BACK = 0.1
# Counts of pairs are a square table.
_MOST_TOKENS = 16_384


@dataclass(frozen=True)
class CountModel:
    """`log_probabilities`: float64 `[V]` of a unigram model; `[V, V]` of a bigram model, the
    token before first. `constant`: what was added to every count."""

    log_probabilities: Tensor
    constant: float

    @property
    def order(self) -> int:
        return self.log_probabilities.dim()

    def loss(self, windows: Iterable[Tensor]) -> float:
        """Nats per token over windows of ids `[B, T]`, all of one length: of all tokens but the
        first of each window, as a language model's loss has it."""
        total, count = 0.0, 0
        for ids in windows:
            before, after = ids[:, :-1].reshape(-1).long(), ids[:, 1:].reshape(-1).long()
            places = (after,) if self.order == 1 else (before, after)
            total -= self.log_probabilities[places].sum().item()
            count += after.numel()
        if not count:
            raise ValueError("CountModel.loss: expected windows of at least two tokens, got none")
        return total / count


def fit_counts(train: Tensor, vocabulary: int, order: int) -> CountModel:
    """Count tokens (`order` 1) or pairs of neighbours (2), with a constant added to every count.

    The constant is chosen on the last tenth of `train`, with the counts of the rest; the counts
    that are kept are of all of it.

    Args:
        train: ids `[tokens]`.
        vocabulary: how many tokens there are.
        order: 1 or 2.

    Raises:
        ValueError: another order, too little text, or a vocabulary whose pairs need too much room.
    """
    if order not in ORDERS or not 0 < vocabulary <= _MOST_TOKENS:
        raise ValueError(
            f"fit_counts: expected order 1 or 2 and a vocabulary of 1 to {_MOST_TOKENS}, got order "
            f"{order} and {vocabulary} tokens"
        )
    cut = math.floor(len(train) * (1 - _HELD_BACK))
    if cut < 2 or len(train) - cut < 2:
        raise ValueError(
            f"fit_counts: expected a training text of 20 tokens or more, got {len(train)}"
        )
    counts, held_back = _counts(train[:cut], vocabulary, order), train[None, cut:]
    candidates = (_model(counts, constant) for constant in CONSTANTS)
    best = min(candidates, key=lambda model: model.loss([held_back]))
    return _model(_counts(train, vocabulary, order), best.constant)


def _counts(ids: Tensor, vocabulary: int, order: int) -> Tensor:
    ids = ids.long()
    if order == 1:
        return torch.bincount(ids, minlength=vocabulary).double()
    pairs = ids[:-1] * vocabulary + ids[1:]
    return torch.bincount(pairs, minlength=vocabulary**2).view(vocabulary, vocabulary).double()


def _model(counts: Tensor, constant: float) -> CountModel:
    smoothed = counts + constant
    return CountModel((smoothed / smoothed.sum(-1, keepdim=True)).log(), constant)
