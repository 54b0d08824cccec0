"""Forces between tokens, and what is worth knowing about those of one attention call."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def gravitational_forces(masses: Tensor, strength: Tensor, table: Tensor) -> Tensor:
    """`F_ij = |G| m_i m_j R_ij` before any cap, `[B, H, N, N]`.

    Args:
        masses: `m` `[B, H, N]`.
        strength: `|G|` `[H]`.
        table: `R = 1 / D` `[N, N]`.
    """
    heavy = strength[:, None] * masses
    return heavy.unsqueeze(-1) * masses.unsqueeze(-2) * table


def force_statistics(
    force: Tensor, score: Tensor, visible: Tensor, max_force: float | None
) -> dict[str, float]:
    """`force_mean` and `force_max` before the cap; `saturation`, the share of pairs at or above it;
    `attention_entropy`, in nats, mean over queries: 0 where every query sees one key only.

    Over the pairs that are visible; nan where there are none.

    Args:
        force: `[B, H, Q, K]`, before the cap.
        score: `[B, H, Q, K]`, what softmax is given.
        visible: bool, broadcastable to `[B, H, Q, K]`.
    """
    visible = visible.expand_as(force)
    weights = score.masked_fill(~visible, torch.finfo(score.dtype).min).softmax(-1)
    entropy = torch.special.entr(weights).sum(-1)[visible.any(-1)]
    pairs = force[visible]
    limit = math.inf if max_force is None else max_force
    numbers = {
        "force_mean": pairs.mean(),
        "force_max": pairs.max() if pairs.numel() else pairs.new_tensor(math.nan),
        "saturation": (pairs >= limit).to(pairs.dtype).mean(),
        "attention_entropy": entropy.mean(),
    }
    # One transfer for all of them.
    return dict(zip(numbers, torch.stack(list(numbers.values())).tolist(), strict=True))
