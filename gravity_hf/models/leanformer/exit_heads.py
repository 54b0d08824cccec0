"""When a token may leave: a small head beside the layers, and who has left in a forward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..visibility import has_values
from .configuration_leanformer import LeanFormerConfig


class ExitHead(nn.Module):
    """How sure it is that the next token would not change with more layers, a logit `[...]`.

    One head for all depths, `up(silu(down(normed hidden) + layer_embedding[depth - 1]))`: `down`
    `[d / 4, d]`, `up` `[1, d / 4]`, `layer_embedding` `[L, d / 4]`. The published head has no norm
    and no embedding. It learns from hidden states as they are and changes none of them.
    """

    def __init__(self, config: LeanFormerConfig) -> None:
        super().__init__()
        width = config.hidden_size
        inner = max(1, width // 4)
        self.width, self.published = width, config.compat_reference
        self.down = nn.Linear(width, inner)
        self.up = nn.Linear(inner, 1)
        if not self.published:
            depths = torch.zeros(config.num_hidden_layers, inner)
            self.layer_embedding = nn.Parameter(depths)

    def forward(self, hidden: Tensor, depth: int) -> Tensor:
        """`hidden` `[..., d]` after `depth` layers."""
        hidden = hidden.detach()
        if self.published:
            inner = self.down(hidden)
        else:
            inner = self.down(F.rms_norm(hidden, (self.width,))) + self.layer_embedding[depth - 1]
        return self.up(F.silu(inner)).squeeze(-1)


class Leaving:
    """Which tokens have left in a forward, and after how many layers.

    Each token leaves by its own hidden state. What it was then is what it stays: later layers read
    its keys and values from it, so that whoever comes after sees every layer's.

    Args:
        head: of the model.
        threshold: a probability; a token at or above it leaves.
        depths: the least depth, and that of the model.
        real: bool `[B, T]`, False for padding, which keeps nobody waiting; None: no padding.
    """

    def __init__(
        self, head: ExitHead, threshold: float, depths: tuple[int, int], real: Tensor | None
    ) -> None:
        self.head, self.threshold = head, threshold
        self.least, self.layers = depths
        self.real = real
        self.left: Tensor | None = None
        self.depth: Tensor | None = None

    def all_left(self) -> bool:
        """Whether nobody needs the layers that follow. It waits for the device; in a graph, where
        it could not look, nothing is left out."""
        if self.left is None or not has_values(self.left):
            return False
        waiting = ~self.left if self.real is None else self.real & ~self.left
        return not bool(waiting.any())

    def stay(self, before: Tensor, after: Tensor) -> Tensor:
        """Hidden states `[B, T, d]` where those who have left keep what they had."""
        return after if self.left is None else torch.where(self.left.unsqueeze(-1), before, after)

    def decide(self, hidden: Tensor, depth: int) -> None:
        """Let tokens leave that have gone through `depth` layers."""
        if self.depth is None:
            self.depth = torch.full(
                hidden.shape[:2], self.layers, dtype=torch.long, device=hidden.device
            )
        if not self.least <= depth < self.layers:
            return
        leaves = self.head(hidden, depth).float().sigmoid() >= self.threshold
        if self.left is not None:
            leaves = leaves & ~self.left
        self.depth = self.depth.masked_fill(leaves, depth)
        self.left = leaves if self.left is None else self.left | leaves


class ExitStates(NamedTuple):
    """Of a sample of tokens in training: `rows` int64 `[R]`, and their hidden states, detached,
    `[n, B, R, d]`, after `first`, `first + 1`, ... layers."""

    rows: Tensor
    hidden: Tensor
    first: int
