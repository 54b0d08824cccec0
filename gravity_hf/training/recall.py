"""Tasks that a model solves only if its attention mixes tokens: copy the previous token, recall the
first one, or the value that stood beside a key.

They tell a working attention from one that is numerically the identity, which a loss on text does
not: text has bigrams, and a model that sees nothing but the token itself learns those. The third
asks for more: what is looked up depends on the token that asks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import (
    PreTrainedModel,
    get_constant_schedule,
    get_cosine_schedule_with_warmup,
)

from .measures import evaluating

_EVALUATION_SEED = 1_000_003
_NO_ANSWER = -100  # what cross_entropy leaves out
_RECALLED = 0.95

# Makes ids and targets `[rows, T]` of that many fresh sequences.
Sampler = Callable[[int, torch.Generator], tuple[Tensor, Tensor]]


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


@dataclass(frozen=True)
class AssociativeSettings:
    """Sequences of `pairs` keys, each with its value beside it, then the same keys in another
    order, each with its answer: `k v k v ... k v`. Keys of a sequence differ, values may repeat;
    ids of values follow those of keys. AdamW is asked for the answers alone, with a learning rate
    that rises for `warmup` steps and falls like a cosine, and gradients no longer than `clip`;
    accuracy is measured on fresh sequences every `interval` steps."""

    pairs: int = 6
    keys: int = 16
    values: int = 16
    steps: int = 1500
    rows: int = 32
    learning_rate: float = 1e-3
    warmup: int = 50
    clip: float = 1.0
    evaluation_rows: int = 256
    interval: int = 100

    @property
    def length(self) -> int:
        return 4 * self.pairs

    @property
    def vocabulary(self) -> int:
        return self.keys + self.values


class AssociativeResult(NamedTuple):
    """`accuracy`: share of all answers of fresh sequences, at the end. `curve`: the same by step.
    `losses`: in nats per answer, of each step."""

    accuracy: float
    curve: dict[int, float]
    losses: tuple[float, ...]

    @property
    def steps_to_recall(self) -> int | None:
        """The first step of the curve with 95 % and more; None: there is none."""
        return next((step for step, share in self.curve.items() if share >= _RECALLED), None)


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
    if task not in TASKS:
        raise ValueError(f"train_recall: expected a task of {list(TASKS)}, got {task!r}")
    _check(model.config, settings)

    def sample(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        ids = _sequences(settings, rows, generator)
        return ids, TASKS[task](ids)

    losses = list(_steps(model, sample, settings, seed))
    return RecallResult(_accuracy(model, sample, settings, seed), _numbers(losses))


def train_associative(
    model: PreTrainedModel, settings: AssociativeSettings | None = None, *, seed: int = 0
) -> AssociativeResult:
    """Train a causal language model to give the value of a key, and measure it on the way.

    A model whose queries know nothing of their own token cannot do better than to guess among the
    values that have not been answered yet.

    Args:
        model: freshly made, on the device to train on; trained in place.
        settings: how long, on what.
        seed: of the sequences.

    Raises:
        ValueError: a model with too few tokens or places, or fewer keys than pairs.
    """
    settings = settings or AssociativeSettings()
    if not 0 < settings.pairs <= settings.keys:
        raise ValueError(
            f"AssociativeSettings.pairs: expected 1 to {settings.keys}, the number of keys, got "
            f"{settings.pairs}"
        )
    _check(model.config, settings)

    def sample(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return associative_rows(settings, rows, generator)

    losses: list[Tensor] = []
    curve = {}
    trained = _steps(model, sample, settings, seed, settings.warmup, settings.clip)
    for step, loss in enumerate(trained, start=1):
        losses.append(loss)
        if step % settings.interval == 0 or step == settings.steps:
            curve[step] = _accuracy(model, sample, settings, seed)
    at_the_end = curve[settings.steps] if curve else _accuracy(model, sample, settings, seed)
    return AssociativeResult(at_the_end, curve, _numbers(losses))


def associative_rows(
    settings: AssociativeSettings, rows: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Ids `[rows, 4 * pairs]`, and for each place the token that should come next where that is an
    answer, else -100."""
    keys = torch.rand(rows, settings.keys, generator=generator).argsort(-1)[:, : settings.pairs]
    shape = (rows, settings.pairs)
    values = torch.randint(settings.keys, settings.vocabulary, shape, generator=generator)
    order = torch.rand(shape, generator=generator).argsort(-1)
    asked, answers = keys.gather(1, order), values.gather(1, order)
    pairs = [torch.stack(pair, -1).flatten(1) for pair in ((keys, values), (asked, answers))]
    ids = torch.cat(pairs, dim=1)
    targets = torch.full_like(ids, _NO_ANSWER)
    targets[:, 2 * settings.pairs :: 2] = answers
    return ids, targets


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


def _steps(
    model: PreTrainedModel,
    sample: Sampler,
    settings: RecallSettings | AssociativeSettings,
    seed: int,
    warmup: int | None = None,
    clip: float | None = None,
) -> Iterator[Tensor]:
    """Train; the loss of every step. `warmup` None: the learning rate stays as it is."""
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate)
    if warmup is None:
        schedule = get_constant_schedule(optimizer)
    else:
        schedule = get_cosine_schedule_with_warmup(optimizer, warmup, settings.steps)
    model.train()
    for _ in range(settings.steps):
        ids, targets = (x.to(device) for x in sample(settings.rows, generator))
        logits = model(input_ids=ids, use_cache=False).logits
        loss = cross_entropy(
            logits.flatten(0, 1).float(), targets.flatten(), ignore_index=_NO_ANSWER
        )
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        schedule.step()
        yield loss.detach()


def _accuracy(
    model: PreTrainedModel,
    sample: Sampler,
    settings: RecallSettings | AssociativeSettings,
    seed: int,
) -> float:
    """The share of right answers in sequences that are not trained on, the same every time."""
    device = next(model.parameters()).device
    fresh = torch.Generator().manual_seed(_EVALUATION_SEED + seed)
    ids, targets = (x.to(device) for x in sample(settings.evaluation_rows, fresh))
    with evaluating(model):
        answers = model(input_ids=ids, use_cache=False).logits.argmax(-1)
    asked = targets != _NO_ANSWER
    return (answers == targets)[asked].double().mean().item()


def _numbers(losses: list[Tensor]) -> tuple[float, ...]:
    return tuple(torch.stack(losses).tolist()) if losses else ()


def _sequences(settings: RecallSettings, rows: int, generator: torch.Generator) -> Tensor:
    shape = (rows, settings.length)
    return torch.randint(0, settings.vocabulary, shape, generator=generator)


def _check(config: Any, settings: RecallSettings | AssociativeSettings) -> None:
    name_of_settings = type(settings).__name__
    for name, least in (
        ("vocab_size", settings.vocabulary),
        ("max_position_embeddings", settings.length),
    ):
        have = getattr(config, name, None)
        if have is None or have < least:
            raise ValueError(
                f"recall: expected a model with {name} of at least {least}, got {have}. Make a "
                f"larger one, or pass other {name_of_settings}"
            )
