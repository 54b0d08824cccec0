"""Which blocks of a feed-forward layer's neurons a token uses, and how well they were chosen."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class ChoiceQuality(NamedTuple):
    """What a choice of blocks keeps, means over tokens, float32, no gradients.

    active: share of the neurons that are computed, `[]`.
    energy_recall: share of the sum of `h^2` in them, `[]`.
    gate_recall: share of the blocks of most energy that are among the chosen, `[]`.
    """

    active: Tensor
    energy_recall: Tensor
    gate_recall: Tensor


def blocks_kept(sparsity: float, blocks: int) -> int:
    """`ceil((1 - sparsity) blocks)`: how many blocks of a layer each token uses, at least one."""
    # 1 - 0.7 is a little more than 0.3, and ten blocks of it are three.
    return max(1, math.ceil(round((1.0 - sparsity) * blocks, 6)))


def top_blocks(scores: Tensor, keep: int) -> Tensor:
    """The `keep` highest of `scores` `[..., blocks]`, as indices `[..., keep]` in rising order.

    Of equal scores the lower index wins. A row's choice depends on that row alone.
    """
    # torch.topk promises no order among equals, which in bfloat16 are common.
    order = scores.detach().sort(dim=-1, descending=True, stable=True).indices
    return order[..., :keep].sort(dim=-1).values


def chosen_mask(chosen: Tensor, blocks: int) -> Tensor:
    """True `[..., blocks]` at the indices `chosen` `[..., keep]`."""
    mask = torch.zeros(*chosen.shape[:-1], blocks, dtype=torch.bool, device=chosen.device)
    return mask.scatter(-1, chosen, True)


def block_energy(hidden: Tensor, block_size: int) -> Tensor:
    """`E_b = sum of h_n^2 over the neurons n of block b`, float32 or more, no gradients.

    Args:
        hidden: `[..., F]`, what goes into the last map. Returns `[..., F / block_size]`.
    """
    squares = hidden.detach().to(torch.promote_types(hidden.dtype, torch.float32)).square()
    return squares.unflatten(-1, (-1, block_size)).sum(-1)


def choice_loss(
    scores: Tensor, energy: Tensor, keep: int, token_mask: Tensor | None = None
) -> Tensor:
    """How far `scores` are from telling the blocks of most energy from the others.

    Binary cross entropy against "among the `keep` of most energy", each class weighted with
    1 / (2 prevalence): chance is ln 2 at every sparsity. Where every block is kept there is
    nothing to tell, and it is 0.

    Args:
        scores, energy: `[..., blocks]`; the energy is a target and gets no gradient.
        token_mask: `[...]`, True or 1 at the tokens that count; None: all. Without one it is 0.
    """
    blocks = scores.shape[-1]
    if keep >= blocks:
        return scores.sum() * 0.0
    scores = scores.to(energy.dtype)
    wanted = chosen_mask(top_blocks(energy, keep), blocks)
    prevalence = keep / blocks
    weights = torch.where(wanted, 0.5 / prevalence, 0.5 / (1.0 - prevalence)).to(scores)
    loss = F.binary_cross_entropy_with_logits(
        scores, wanted.to(scores.dtype), weights, reduction="none"
    ).mean(-1)
    if token_mask is None:
        return loss.mean()
    counted = token_mask.to(loss.dtype)
    return (loss * counted).sum() / counted.sum().clamp(min=1.0)


def choice_quality(
    chosen: Tensor, energy: Tensor, token_mask: Tensor | None = None
) -> ChoiceQuality:
    """What the choice `[..., keep]` keeps of the energy `[..., blocks]`; a token without energy has
    lost none. `token_mask`: as of `choice_loss`."""
    blocks, keep = energy.shape[-1], chosen.shape[-1]
    mask = chosen_mask(chosen, blocks)
    best = chosen_mask(top_blocks(energy, keep), blocks)
    total = energy.sum(-1)
    kept = torch.where(total > 0, (energy * mask).sum(-1) / total, 1.0)
    found = (mask & best).sum(-1) / keep
    active = torch.full_like(kept, keep / blocks)
    counted = torch.ones_like(kept) if token_mask is None else token_mask.to(kept.dtype)
    count = counted.sum().clamp(min=1.0)
    return ChoiceQuality(*((value * counted).sum() / count for value in (active, kept, found)))
