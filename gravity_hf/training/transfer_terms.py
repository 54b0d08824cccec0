"""How far a gravity model is from its host: the terms of the transfer loss.

Every term is a mean over sequences, and within a sequence over its real tokens. So a batch of four
gives the mean of two batches of two, padded or not: accumulation and several machines change
nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..integration.attention import AttentionCall
from ..ops.reference import compute_dtype


def relative_squared_error(student: Tensor, teacher: Tensor, rows: Tensor | None) -> Tensor:
    """`|student - teacher|^2 / |teacher|^2`, each summed over a sequence, mean over sequences.

    Free of scale, so that every layer counts alike whatever the size of its values: 1 is as bad as
    answering 0. (lolcats, arXiv 2410.10254, takes the plain mean squared error times 1000.)

    Args:
        student: `[B, T, ...]`.
        teacher: the same shape.
        rows: `[B, T]` bool, the real tokens; None: all.
    """
    dtype = compute_dtype(student.dtype)
    student, teacher = student.to(dtype).flatten(2), teacher.to(dtype).flatten(2)
    error = _over_rows((student - teacher).square().sum(-1), rows)
    return (error / _over_rows(teacher.square().sum(-1), rows).clamp(min=1e-30)).mean()


def attention_divergence(
    student: AttentionCall, teacher: AttentionCall, rows: Tensor | None
) -> Tensor:
    """KL(dot product || gravity) of the attention rows, nats; mean over heads and real rows."""
    log_teacher = teacher.dot_product_scores().log_softmax(-1)
    log_student = student.gravity_scores().log_softmax(-1)
    divergence = _divergence(log_teacher, log_student).mean(1)
    return _row_mean(divergence, rows).mean()


def logits_divergence(
    student: Tensor, teacher: Tensor, positions: Tensor | None, temperature: float
) -> Tensor:
    """KL(teacher || student) of the softened predictions, nats, times `temperature ** 2`.

    The factor keeps the gradients' size as the temperature changes (Hinton et al., arXiv
    1503.02531).

    Args:
        student: `[B, T, classes]` or `[B, classes]`.
        teacher: the same shape.
        positions: `[B, T]` bool, where a prediction counts; None: everywhere.
    """
    if student.dim() == 2:
        student, teacher, positions = student[:, None], teacher[:, None], None
    if positions is None:
        positions = student.new_ones(student.shape[:2], dtype=torch.bool)
    dtype = compute_dtype(student.dtype)
    # Only the positions that count are upcast: a vocabulary in float32 is what fills the memory.
    chosen, target = student[positions].to(dtype), teacher[positions].to(dtype)
    divergence = _divergence(
        (target / temperature).log_softmax(-1), (chosen / temperature).log_softmax(-1)
    )
    filled = divergence.new_zeros(positions.shape).masked_scatter(positions, divergence)
    return temperature**2 * _row_mean(filled, positions).mean()


def _divergence(log_teacher: Tensor, log_student: Tensor) -> Tensor:
    return (log_teacher.exp() * (log_teacher - log_student)).sum(-1)


def _over_rows(values: Tensor, rows: Tensor | None) -> Tensor:
    """`[B]`: sums of `[B, T]` over the real rows."""
    return (values if rows is None else values.masked_fill(~rows, 0.0)).sum(-1)


def _row_mean(values: Tensor, rows: Tensor | None) -> Tensor:
    if rows is None:
        return values.mean(-1)
    return _over_rows(values, rows) / rows.sum(-1).clamp(min=1)
