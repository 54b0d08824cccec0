"""Two measures of what a conversion did: loss of a language model, likeness of embeddings."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..layers.modes import in_evaluation


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no gradients; the mode comes back afterwards."""
    with in_evaluation(model), torch.no_grad():
        yield


def mean_loss(model: nn.Module, batches: Iterable[Tensor]) -> float:
    """Next-token loss in nats per token over windows of ids `[B, T]`, all of the same length."""
    total, windows = 0.0, 0
    with evaluating(model):
        for ids in batches:
            ids = ids.to(_device(model))
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            total += loss.item() * len(ids)
            windows += len(ids)
    if not windows:
        raise ValueError("mean_loss: expected at least one window of tokens, got none")
    return total / windows


def pooled_embeddings(model: nn.Module, batches: Iterable[dict[str, Any]]) -> Tensor:
    """Mean of the last hidden states over real tokens, `[N, hidden]`, float64 on the CPU."""
    pooled = []
    with evaluating(model):
        for batch in batches:
            batch = {name: value.to(_device(model)) for name, value in batch.items()}
            states = model(**batch, output_hidden_states=True).hidden_states[-1].double()
            weights = batch["attention_mask"].double()[..., None]
            pooled.append(((states * weights).sum(1) / weights.sum(1)).cpu())
    return torch.cat(pooled)


def embedding_likeness(original: Tensor, converted: Tensor) -> dict[str, float]:
    """How alike two sets of embeddings `[N, hidden]` of the same N texts are.

    `cosine_mean`, `cosine_min`: each text against itself. `spearman`: rank correlation of all
    pairwise similarities. `same_neighbour`: share of texts that keep their nearest other text.
    """
    cosine = nn.functional.cosine_similarity(original, converted)
    before, after = _similarities(original), _similarities(converted)
    upper = torch.triu(torch.ones_like(before, dtype=torch.bool), diagonal=1)
    same = before.fill_diagonal_(-2).argmax(-1) == after.fill_diagonal_(-2).argmax(-1)
    return {
        "cosine_mean": cosine.mean().item(),
        "cosine_min": cosine.min().item(),
        "spearman": _spearman(before[upper], after[upper]),
        "same_neighbour": same.double().mean().item(),
    }


def _similarities(embeddings: Tensor) -> Tensor:
    unit = nn.functional.normalize(embeddings)
    return unit @ unit.T


def _spearman(x: Tensor, y: Tensor) -> float:
    if len(x) < 2:
        return math.nan
    # Ties are as good as absent among float64 similarities, so ordinal ranks do.
    ranks = torch.stack([x.argsort().argsort(), y.argsort().argsort()]).double()
    return torch.corrcoef(ranks)[0, 1].item()


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
