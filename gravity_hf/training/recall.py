"""Two tasks that a model solves only if its attention mixes tokens: copy the previous token, recall
the first one.

They tell a working attention from one that is numerically the identity, which a loss on text does
not: text has bigrams, and a model that sees nothing but the token itself learns those.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

from .measures import evaluating

_EVALUATION_SEED = 1_000_003


def previous_tokens(ids: Tensor) -> Tensor:
    """For each place of `ids` `[B, T]` the token before it; the first place has its own."""
    return torch.cat([ids[:, :1], ids[:, :-1]], dim=1)


def first_tokens(ids: Tensor) -> Tensor:
    """For each place of `ids` `[B, T]` the first token of its row."""
    return ids[:, :1].expand_as(ids)


TASKS: dict[str, Callable[[Tensor], Tensor]] = {
    "previous": previous_tokens,
    "first": first_tokens,
}


@dataclass(frozen=True)
class RecallSettings:
    """Random sequences of `length` tokens out of `vocabulary`, new ones in each of `steps`, for
    AdamW. A model that mixes nothing is right in `chance` of all places: the first of a row."""

    length: int = 32
    vocabulary: int = 32
    steps: int = 400
    rows: int = 32
    learning_rate: float = 3e-3
    evaluation_rows: int = 256

    @property
    def chance(self) -> float:
        """Of the first place the answer is known, of the others one in `vocabulary` is right."""
        return (1 + (self.length - 1) / self.vocabulary) / self.length


class RecallResult(NamedTuple):
    """`accuracy`: share of all places of fresh sequences. `losses`: in nats per place, of each
    step."""

    accuracy: float
    losses: tuple[float, ...]


def train_recall(
    model: PreTrainedModel, task: str, settings: RecallSettings | None = None, *, seed: int = 0
) -> RecallResult:
    """Train a causal language model on a task, then measure it on sequences that it has not seen.

    The logits of a place answer for that place: nothing is shifted.

    Args:
        model: freshly made, on the device to train on; trained in place.
        task: `"previous"` or `"first"`.
        settings: how long, on what.
        seed: of the sequences.

    Raises:
        ValueError: no such task, or a model with too few tokens or places.
    """
    settings = settings or RecallSettings()
    _check(model.config, task, settings)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    losses = []
    model.train()
    for _ in range(settings.steps):
        ids = _sequences(settings, settings.rows, generator).to(device)
        logits = model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(logits.flatten(0, 1).float(), TASKS[task](ids).flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    fresh = torch.Generator().manual_seed(_EVALUATION_SEED + seed)
    ids = _sequences(settings, settings.evaluation_rows, fresh).to(device)
    with evaluating(model):
        answers = model(input_ids=ids, use_cache=False).logits.argmax(-1)
    accuracy = (answers == TASKS[task](ids)).double().mean().item()
    return RecallResult(accuracy, tuple(torch.stack(losses).tolist()) if losses else ())


def change_before(model: PreTrainedModel, ids: Tensor, place: int) -> tuple[float, float]:
    """How far another token at `place` moves the logits: the largest change in any place before it,
    which is 0 where the model is causal, and the largest change from it on.

    Args:
        model: a causal language model.
        ids: `[B, T]`.
        place: of the token that is replaced, from 1 to T - 1.
    """
    changed = ids.clone()
    changed[:, place] = (ids[:, place] + 1) % model.config.vocab_size
    with evaluating(model):
        one, other = (model(input_ids=rows, use_cache=False).logits for rows in (ids, changed))
    moved = (one - other).abs().amax(-1)
    return moved[:, :place].max().item(), moved[:, place:].max().item()


def _sequences(settings: RecallSettings, rows: int, generator: torch.Generator) -> Tensor:
    shape = (rows, settings.length)
    return torch.randint(0, settings.vocabulary, shape, generator=generator)


def _check(config: Any, task: str, settings: RecallSettings) -> None:
    if task not in TASKS:
        raise ValueError(f"train_recall: expected a task of {list(TASKS)}, got {task!r}")
    for name, least in (
        ("vocab_size", settings.vocabulary),
        ("max_position_embeddings", settings.length),
    ):
        have = getattr(config, name, None)
        if have is None or have < least:
            raise ValueError(
                f"train_recall: expected a model with {name} of at least {least}, got {have}. Make "
                "a larger one, or pass other RecallSettings"
            )
