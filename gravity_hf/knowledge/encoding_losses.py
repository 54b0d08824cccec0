"""What a delta is trained for: the answer, and nothing else.

    loss = -log p(answer | prompts) + locality * KL(base || with delta | unrelated) + norm * |BA|^2

each term a mean over the prompts of one fact, so that facts trained side by side share nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Factors = Mapping[str, tuple[Tensor, Tensor]]


def answer_loss(log_p: Tensor, labels: Tensor) -> Tensor:
    """`-log p` of whole answers, in nats: `[rows]`.

    Args:
        log_p: `[rows, keep, vocabulary]`, at the positions before the answers' tokens.
        labels: `[rows, keep]` int64; -1 where nothing is to be predicted.
    """
    own = log_p.gather(-1, labels.clamp_min(0).unsqueeze(-1)).squeeze(-1)
    return -torch.where(labels >= 0, own, 0.0).sum(-1)


def answer_margin(log_p: Tensor, labels: Tensor) -> Tensor:
    """By how much the least certain token of each answer leads all others, in nats: `[rows]`.

    Negative where another token is more likely somewhere. Arguments as for `answer_loss`.
    """
    index = labels.clamp_min(0).unsqueeze(-1)
    others = log_p.scatter(-1, index, float("-inf")).amax(-1)
    lead = log_p.gather(-1, index).squeeze(-1) - others
    return torch.where(labels >= 0, lead, float("inf")).amin(-1)


def divergence(before: Tensor, after: Tensor) -> Tensor:
    """`KL(before || after)` of log-probabilities `[rows, vocabulary]`, in nats: `[rows]`."""
    return (before.exp() * (before - after)).sum(-1)


def squared_norm(factors: Factors) -> Tensor:
    """`|BA|_F^2` of all maps of one delta, without forming `BA`: `tr(B'B AA')`."""
    return torch.stack([((B.mT @ B) * (A @ A.mT)).sum() for A, B in factors.values()]).sum()
