"""What a LeanFormer learns beside its language model: to screen, to choose neurons, to leave."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .exit_heads import ExitStates

if TYPE_CHECKING:
    from .causal_leanformer import LeanFormerForCausalLM


def mean_of(losses: Sequence[Tensor | None]) -> Tensor | None:
    """Over the layers that have one; None where none has."""
    found = [x for x in losses if x is not None]
    return torch.stack([x.float() for x in found]).mean() if found else None


def exit_loss(
    model: LeanFormerForCausalLM, states: ExitStates, final: Tensor, counted: Tensor | None
) -> Tensor:
    """Binary cross-entropy of the exit head against whether the likeliest next token is the same
    as after all layers. Its gradient reaches the head alone.

    Args:
        states: of a sample of tokens, after each depth where they could leave.
        final: `[B, R, d]`, what the language model's head reads of the same tokens.
        counted: bool `[B, R]`, the tokens that count; None: all.
    """
    losses = []
    with torch.no_grad():
        agreed = model.lm_head(final).argmax(-1)
    for n, hidden in enumerate(states.hidden):
        with torch.no_grad():
            same = model.lm_head(model.model.norm(hidden)).argmax(-1) == agreed
        logits = model.model.exit_head(hidden, states.first + n).float()
        losses.append(
            F.binary_cross_entropy_with_logits(logits, same.to(logits.dtype), reduction="none")
        )
    loss = torch.stack(losses).mean(0)
    if counted is None:
        return loss.mean()
    weights = counted.to(loss.dtype)
    return (loss * weights).sum() / weights.sum().clamp(min=1.0)


def share_of_batch(labels: Tensor, num_items_in_batch: Any) -> Tensor | float:
    """What the means of this batch weigh where a trainer sums the losses of several: the share of
    its tokens among `num_items_in_batch`, as the language model's loss has it. None: 1."""
    if num_items_in_batch is None:
        return 1.0
    items = num_items_in_batch
    if isinstance(items, Tensor):
        items = items.to(labels.device)
    return (labels[:, 1:] != -100).sum() / items
