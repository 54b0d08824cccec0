"""Prompts and answers as rows of token ids, and the logits that a model gives for the answers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..integration.placement import execution_device
from .errors import ValidationError
from .fact_tokens import answer_ids, prompt_ids
from .facts import Fact
from .targets import base_model

# Widths are multiples of this, so that a row's company rarely changes the shapes it runs in.
WIDTH_STEP = 8


@dataclass(frozen=True)
class FactRow:
    """One prompt of a fact, with an answer or none.

    Args:
        fact: that it belongs to.
        kind: `"prompt"`, `"paraphrase"` or `"unrelated"`.
        prompt: its text.
        ids: tokens of the prompt and of the answer after it.
        answer: how many of them are the answer's; 0 for a prompt whose next token matters.
        key: position of the token at which the model knows what the prompt is about.
    """

    fact: Fact
    kind: str
    prompt: str
    ids: tuple[int, ...]
    answer: int = 0
    key: int = -1

    @property
    def fed(self) -> tuple[int, ...]:
        """What the model reads: an answer's last token is only predicted."""
        return self.ids[:-1] if self.answer else self.ids


def padded_width(row: FactRow) -> int:
    """To how many tokens a row is padded at least."""
    return -(-len(row.fed) // WIDTH_STEP) * WIDTH_STEP


def answer_row(tokenizer: Any, fact: Fact, kind: str, prompt: str, answer: str) -> FactRow:
    """A row with an answer. ValidationError where the tokenizer cannot write it."""
    answered = answer_ids(tokenizer, prompt, answer) if answer.strip() else []
    if not answered:
        raise ValidationError(
            f"fact {fact.id!r}: expected an answer to {prompt!r} with tokens, got {answer!r}"
        )
    asked = prompt_ids(tokenizer, prompt)
    key = _subject_position(tokenizer, fact.subject, prompt, asked)
    return FactRow(fact, kind, prompt, (*asked, *answered), len(answered), key)


def _subject_position(tokenizer: Any, subject: str, prompt: str, ids: Sequence[int]) -> int:
    """Which token is the last of the subject; the prompt's last where that is not said, or is the
    first token, which models treat as a sink of attention whatever it says."""
    last = len(ids) - 1
    start = prompt.lower().rfind(subject.lower()) if subject.strip() else -1
    if start < 0:
        return last
    head = prompt_ids(tokenizer, prompt[: start + len(subject)])
    # A token may hold the end of the subject and what follows: then it is the one meant.
    same = (i for i, (x, y) in enumerate(zip(head, ids, strict=False)) if x != y)
    position = min(next(same, len(head) - 1), last)
    return position if position > 0 else last


def prompt_row(tokenizer: Any, fact: Fact, prompt: str) -> FactRow:
    """A prompt that must not change."""
    return FactRow(fact, "unrelated", prompt, tuple(prompt_ids(tokenizer, prompt)))


@dataclass(frozen=True)
class RowBatch:
    """Rows as a model takes them, padded on the left: what is scored is at the end of all.

    Args:
        inputs: `input_ids`, `attention_mask` and, where the model takes them, `position_ids`, each
            `[rows, T]`, and `use_cache` and `logits_to_keep`.
        labels: `[rows, keep]` int64, the answers' tokens at the positions that predict them; -1
            where nothing is to be predicted.
    """

    inputs: dict[str, Any]
    labels: Tensor

    @property
    def keep(self) -> int:
        """How many positions at the end are scored in some row."""
        return self.labels.shape[1]

    def rows(self, index: Tensor) -> RowBatch:
        """Some of the rows."""
        inputs = {
            name: value[index.to(value.device)] if isinstance(value, Tensor) else value
            for name, value in self.inputs.items()
        }
        return RowBatch(inputs, self.labels[index.to(self.labels.device)])


def row_batch(model: nn.Module, rows: Sequence[FactRow]) -> RowBatch:
    """The rows on the model's device."""
    fed = [row.fed for row in rows]
    width = max(map(padded_width, rows))
    keep = max(1, *(row.answer for row in rows))
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    labels = torch.full((len(rows), keep), -1)
    for i, (row, tokens) in enumerate(zip(rows, fed, strict=True)):
        ids[i, width - len(tokens) :] = torch.tensor(tokens)
        mask[i, width - len(tokens) :] = 1
        if row.answer:
            labels[i, keep - row.answer :] = torch.tensor(row.ids[-row.answer :])
    device = execution_device(model) or torch.device("cpu")
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    known = inspect.signature(base_model(model).forward).parameters
    if "position_ids" in known:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp_min(0)
    inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
    inputs |= {"use_cache": False} if "use_cache" in known else {}
    inputs |= {"logits_to_keep": keep} if "logits_to_keep" in known else {}
    return RowBatch(inputs, labels.to(device))


def scored_logits(model: nn.Module, batch: RowBatch) -> Tensor:
    """Logits at the scored positions, `[rows, keep, vocabulary]`, float32."""
    return model(**batch.inputs).logits[:, -batch.keep :].float()


def row_batches(rows: Sequence[FactRow], size: int) -> Iterator[list[int]]:
    """Positions of the rows, in batches of at most `size` of nearly one length."""
    order = sorted(range(len(rows)), key=lambda i: (len(rows[i].ids), i))
    for start in range(0, len(order), size):
        yield order[start : start + size]
