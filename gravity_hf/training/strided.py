"""Loss of one long text, each token predicted once, with as much context as the stride leaves."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from .measures import evaluating

# Elements of one batch of logits in float32; bounds the memory of a measurement, not its result.
_LOGITS_AT_ONCE = 1 << 27
_IGNORED = -100


class LossResult(NamedTuple):
    """`nats_per_token`: mean next-token loss over `tokens` predictions. `perplexity`: its
    exponential. `bits_per_byte`: the loss per UTF-8 byte of the text, None if that is unknown."""

    nats_per_token: float
    perplexity: float
    tokens: int
    bits_per_byte: float | None = None


def strided_loss(
    model: nn.Module,
    ids: Tensor | Sequence[int],
    length: int,
    stride: int,
    *,
    text_bytes: int | None = None,
    batch_size: int | None = None,
    progress: bool | None = None,
) -> LossResult:
    """Next-token loss of one long text, read through windows that overlap.

    Window k holds the ids from `k * stride` to `k * stride + length`, the last one what is left.
    A window is asked only for the tokens that no window before it was asked for: the first for all
    but its first token, the others for their last `stride` tokens, or fewer at the end. So with
    `stride < length` every token but the text's first counts once, given at least
    `length - stride` tokens of context. With `stride == length` windows are disjoint and the first
    token of each, which has no context, does not count: the usual block loss. The method is that
    of transformers' guide "Perplexity of fixed-length models".

    Args:
        model: causal; its own training mode comes back afterwards.
        ids: `[tokens]`.
        length: tokens in a window.
        stride: from 1 to `length`. Smaller: more context for each token, more work.
        text_bytes: UTF-8 bytes of the text that `ids` stands for, for bits per byte.
        batch_size: windows at once; None takes what fits a fixed amount of memory.
        progress: True or False; None shows a bar on terminals only.

    Raises:
        ValueError: fewer than two ids, or numbers outside their range.
    """
    ids = torch.as_tensor(ids).long().flatten()
    if len(ids) < 2:
        raise ValueError(f"strided_loss: expected at least 2 tokens, got {len(ids)}")
    if length < 2 or not 1 <= stride <= length:
        raise ValueError(
            f"strided_loss: expected length >= 2 and stride from 1 to length, got length {length} "
            f"and stride {stride}"
        )
    device = next(model.parameters()).device
    windows = _windows(len(ids), length, stride)
    total, tokens = 0.0, 0
    bar = tqdm(total=len(windows), desc="loss", disable=None if progress is None else not progress)
    with evaluating(model), bar:
        for batch in _batches(windows, batch_size or _fitting(model, length)):
            inputs = torch.stack([ids[w.start : w.end] for w in batch]).to(device)
            labels = inputs.clone()
            for row, window in enumerate(batch):
                labels[row, : window.context] = _IGNORED
            logits = model(input_ids=inputs, use_cache=False).logits[:, :-1].float()
            total += _summed_loss(logits, labels[:, 1:])
            tokens += int((labels[:, 1:] != _IGNORED).sum())
            bar.update(len(batch))
    mean = total / tokens
    per_byte = mean / math.log(2) * len(ids) / text_bytes if text_bytes else None
    return LossResult(mean, _exp(mean), tokens, per_byte)


class _Window(NamedTuple):
    """Ids from `start` to `end`; the first `context` of them are not asked for."""

    start: int
    end: int
    context: int


def _windows(tokens: int, length: int, stride: int) -> list[_Window]:
    windows, covered = [], 0
    for start in range(0, tokens, stride):
        end = min(start + length, tokens)
        # A lone last token would have no context.
        if end - start > 1:
            windows.append(_Window(start, end, max(covered - start, 1)))
        covered = end
        if end == tokens:
            break
    return windows


def _batches(windows: list[_Window], size: int) -> Iterator[list[_Window]]:
    """Batches of windows of one length: only the last window may be shorter."""
    whole = [w for w in windows if w.end - w.start == windows[0].end - windows[0].start]
    for start in range(0, len(whole), size):
        yield whole[start : start + size]
    if len(whole) < len(windows):
        yield windows[-1:]


def _summed_loss(logits: Tensor, labels: Tensor) -> float:
    losses = nn.functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=_IGNORED, reduction="none"
    )
    return losses.double().sum().item()


def _fitting(model: nn.Module, length: int) -> int:
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    return max(1, min(64, _LOGITS_AT_ONCE // (length * vocabulary)))


def _exp(nats: float) -> float:
    return math.exp(nats) if nats < 700 else math.inf
