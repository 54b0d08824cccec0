"""Attention as published: screening by maps of its own, and one choice of keys for all heads."""

from __future__ import annotations

import torch
from torch import Tensor

from ...layers.low_rank import LowRankLinear
from ...ops.reference import split_mask
from .attention import STATISTICS, LeanFormerAttention, Screened
from .call import Attended, Call, attend, eager_attention, seen_by
from .configuration_leanformer import LeanFormerConfig
from .positions import Rotary


class PublishedAttention(LeanFormerAttention):
    """`LeanFormerAttention` whose screening is the dot product of `q_screen` and `k_screen`, `[d /
    4, d]` of low rank, of the hidden states.

    A query attends to the `attention_top_k` keys that it ranks highest among those that it may see,
    or to all of them if they are fewer; itself among them only if it ranks so. Published code let
    the first queries see what comes after them; this does not. All scores are computed and the
    others hidden, as published: nothing is saved.

    A cache keeps `d / 4` more numbers of a token beside its keys, a share of them in each head.
    """

    def _add_screening(self, config: LeanFormerConfig) -> None:
        width, rank = config.hidden_size, config.screen_dim
        self.top_k, self.min_length = config.attention_top_k, config.sparse_min_length
        self.q_screen = LowRankLinear(width, width // 4, rank)
        self.k_screen = LowRankLinear(width, width // 4, rank)

    @property
    def dense_length(self) -> int:
        return max(self.top_k, self.min_length)

    @property
    def screening_cost(self) -> float:
        return 0.25

    @torch.no_grad()
    def choice_statistics(self, call: Call, screened: Screened) -> dict[str, Tensor]:
        chosen, weights = self._chosen(call, screened), eager_attention(call).weights
        seen, _ = split_mask(seen_by(call))
        recall = (weights * chosen).sum((0, 2, 3)) / weights.sum((0, 2, 3))
        pairs = chosen.sum() / seen.expand_as(chosen).sum()
        found = (recall, pairs, pairs + self.screening_cost)
        return dict(zip(STATISTICS, found, strict=True))

    def _keys_and_values(self, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        keys, values = super()._keys_and_values(hidden, rotary)
        # Screening has a loss of its own, and changes nothing before it.
        screen = self.k_screen(hidden.detach()).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        return torch.cat([keys, screen.to(keys.dtype)], -1), values

    def _parted(self, keys: Tensor) -> tuple[Tensor, Tensor | None]:
        return keys[..., : self.head_dim], keys[..., self.head_dim :]

    def _screened(self, hidden: Tensor, call: Call, kept: Tensor) -> Screened:
        queries = self.q_screen(hidden.detach()).unsqueeze(1)
        return Screened(queries, kept.transpose(1, 2).flatten(2).unsqueeze(1))

    def _attend_sparsely(self, call: Call, screened: Screened) -> Attended:
        chosen, (_, bias) = self._chosen(call, screened), split_mask(seen_by(call))
        if bias is not None:
            chosen = bias.masked_fill(~chosen, torch.finfo(bias.dtype).min)
        return attend(call._replace(mask=chosen))

    @torch.no_grad()
    def _chosen(self, call: Call, screened: Screened) -> Tensor:
        """Bool `[B, 1, Tq, Tk]`."""
        seen, _ = split_mask(seen_by(call))
        scores = screened.queries.float() @ screened.keys.float().transpose(-2, -1)
        scores = scores.masked_fill(~seen, float("-inf"))
        best = scores.topk(min(self.top_k, scores.shape[-1]), dim=-1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True) & seen

    def _loss(self, call: Call, screened: Screened) -> Tensor:
        # The mean over heads of what one student has yet to learn from each.
        shared = (x.expand(-1, self.heads, -1, -1) for x in screened[:2])
        return super()._loss(call, Screened(*shared))
