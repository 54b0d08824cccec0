"""What a reconstruction costs, and how well it points where its target does."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def masked_mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Mean of `values` `[B, N]` over the tokens that `mask`, bool `[B, N]`, counts; 0 of none."""
    if mask is None:
        return values.mean()
    return values.masked_fill(~mask, 0.0).sum() / mask.sum().clamp(min=1)


def mean_cosine(x: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Mean cosine between `x` and `target` `[B, N, P]` over tokens."""
    return masked_mean(F.cosine_similarity(x, target, dim=-1), mask)


def reconstruction_loss(x: Tensor, target: Tensor, mask: Tensor | None, kind: str) -> Tensor:
    """`"mse"`: mean squared difference; `"cosine"`: `1 - mean_cosine`; `"cosine_mse"`: their sum.

    x, target: `[B, N, P]`, at least float32; mask: bool `[B, N]`, tokens that count.
    """
    if mask is not None:
        # Labels of padding may be anything. In a loss that leaves their tokens out at its end only,
        # a nan would still be in the gradients: 0 times nan.
        x, target = (y.masked_fill(~mask.unsqueeze(-1), 0.0) for y in (x, target))
    loss = x.new_zeros(())
    if kind != "cosine":
        loss = loss + masked_mean((x - target).square().mean(-1), mask)
    if kind != "mse":
        loss = loss + (1.0 - mean_cosine(x, target, mask))
    return loss
