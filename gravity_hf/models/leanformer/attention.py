"""Attention of a LeanFormer: low-rank maps, and the keys that a screening chooses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.models.llama.modeling_llama import rotate_half

from ...layers.low_rank import linear
from ...layers.screening import Screening
from ...ops.sparse import (
    DotProduct,
    Gravity,
    KeyBudget,
    Selection,
    screening_loss,
    select_keys,
    selection_statistics,
    sparse_attention,
)
from .call import Attended, Call, attend, eager_attention, seen_by
from .configuration_leanformer import LeanFormerConfig
from .gravity import LeanFormerGravity
from .positions import Rotary, Tokens

# A cache that computes what screening reads when a key comes in hands it on under this name.
_KEPT = "_kept_screening"
# Of a choice of keys, in the order in which they are computed.
STATISTICS = ("attention_recall", "pairs", "pairs_with_screening")


class AttentionResult(NamedTuple):
    """`output` `[B, T, d]`; where asked for `weights` `[B, H, T, Tk]` and what the screening is to
    learn, a scalar."""

    output: Tensor
    weights: Tensor | None
    screening_loss: Tensor | None


class Screened(NamedTuple):
    """What the first pass reads: `queries` `[B, H, T, s]`, `keys` `[B, G, Tk, s]`; where a cache
    keeps them `means` of blocks of keys, `[B, G, blocks, s]`."""

    queries: Tensor
    keys: Tensor
    means: Tensor | None = None


class LeanFormerAttention(nn.Module):
    """`o_proj` of what every head gathers from the keys that it looks at.

    Children: `q_proj`, `k_proj`, `v_proj`, `o_proj`; where the config has them `q_norm` and
    `k_norm` over a head, `gravity`, `screening`. `attention_policy`, which a model without
    screening has not: `"sparse"`, or `"dense"`, every key; see
    `gravity_hf.layers.sparsity_policy.sparsity`.
    """

    def __init__(self, config: LeanFormerConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx, self.head_dim = layer_idx, int(config.head_dim or 0)
        self.heads, self.groups = config.num_attention_heads, int(config.num_key_value_heads or 0)
        self.dropout, self.rows = float(config.dropout), config.screening_rows
        self.scaling = self.head_dim**-0.5
        width, inner = config.hidden_size, self.heads * self.head_dim
        kept = self.groups * self.head_dim
        self._add_map("q_proj", config, width, inner, config.attention_bias)
        self._add_map("k_proj", config, width, kept, config.attention_bias)
        self._add_map("v_proj", config, width, kept, config.attention_bias)
        self._add_map("o_proj", config, inner, width, config.attention_output_bias)
        norms = config.qk_norm
        self.q_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if norms else None
        self.k_norm = nn.RMSNorm(self.head_dim, eps=config.norm_eps) if norms else None
        self.gravity = LeanFormerGravity(config) if config.attention == "gravity" else None
        # Set only while somebody watches: called with this layer, a call, and what it screens.
        self.observer: Callable[..., None] | None = None
        self.chooses = config.screening != "none"
        self.learns_to_screen = config.screening == "learned"
        if self.chooses:
            self.attention_policy = "sparse"
            self._add_screening(config)

    def forward(
        self,
        hidden: Tensor,
        tokens: Tokens,
        rotary: Rotary,
        cache: Any = None,
        how: str = "sdpa",
        output_attentions: bool = False,
        with_loss: bool = False,
    ) -> AttentionResult:
        """`hidden` `[B, T, d]`, normed; `cache`: gets this layer's keys and values, gives those of
        all tokens; `how`: transformers' name of an implementation, `"sdpa"` or `"eager"`."""
        queries = self._turned(self._heads(self.q_proj(hidden)), self.q_norm, rotary)
        keys, values = self._keys_and_values(hidden, rotary)
        if cache is not None:
            keys, values = cache.update(keys, values, self.layer_idx)
        keys, kept = self._parted(keys)
        dropout = self.dropout if self.training else 0.0
        how_to = (self._score(), dropout, how == "eager" or output_attentions)
        call = Call(queries, keys, values, tokens.mask, tokens.slots, tokens.origin, *how_to)

        sparse = self._is_sparse(call)
        watched = self.observer is not None and self.chooses
        screens = sparse or watched or (with_loss and self.learns_to_screen)
        screened = self._screened(hidden, call, kept) if screens else None
        if watched:
            self.observer(self, call, screened)
        attended = self._attend_sparsely(call, screened) if sparse else attend(call)
        loss = self._loss(call, screened) if with_loss and self.learns_to_screen else None
        output = self.o_proj(attended.output.transpose(1, 2).flatten(2))
        return AttentionResult(output, attended.weights if output_attentions else None, loss)

    def remember(self, hidden: Tensor, rotary: Rotary, cache: Any) -> None:
        """Keep keys and values of `hidden` `[B, T, d]` in a cache, and compute nothing else."""
        cache.update(*self._keys_and_values(hidden, rotary), self.layer_idx)

    @property
    def dense_length(self) -> int:
        """With so many keys all of them are seen."""
        return self.budget.dense_length

    @property
    def screening_cost(self) -> float:
        """Of the first pass, for each causal pair, in products of a query and a key."""
        width = self.screening.screen_dim if self.learns_to_screen else self.head_dim
        shared = self.heads // self.groups * self.budget.block_size
        return width / (self.head_dim * shared)

    def choice_statistics(self, call: Call, screened: Screened) -> dict[str, Tensor]:
        """What the choice for a call keeps, see `statistics.observed`."""
        choice, width = self._choice(call, screened), screened.queries.shape[-1]
        score = call.score
        found = selection_statistics(call.queries, call.keys, score, choice, screen_dim=width)
        return dict(zip(STATISTICS, found, strict=True))

    def _keys_and_values(self, hidden: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor]:
        keys = self._turned(self._heads(self.k_proj(hidden)), self.k_norm, rotary)
        return keys, self._heads(self.v_proj(hidden))

    def _parted(self, keys: Tensor) -> tuple[Tensor, Any]:
        """Keys as a cache gives them: those of the heads, and what else it keeps beside them."""
        return keys, getattr(keys, _KEPT, None)

    def _is_sparse(self, call: Call) -> bool:
        if not self.chooses or self.attention_policy == "dense":
            return False
        return call.keys.shape[2] > self.dense_length

    def _screened(self, hidden: Tensor, call: Call, kept: Any) -> Screened:
        """kept: screening `keys` and block `means` that a cache has computed before."""
        means = None
        if kept is not None and call.mask is None and kept.block_size == self.budget.block_size:
            means = kept.means
        if not self.learns_to_screen:
            return Screened(call.queries, call.keys, means)
        if kept is not None and kept.keys is not None:
            return Screened(self.screening.screen_queries(call.queries), kept.keys, means)
        return Screened(*self.screening(call.queries, call.keys))

    def _attend_sparsely(self, call: Call, screened: Screened) -> Attended:
        if call.eager:
            return eager_attention(call, self._choice(call, screened).mask())
        *screen, means = screened
        output = sparse_attention(
            *(call.queries, call.keys, call.values),
            score=call.score,
            budget=self.budget,
            screen=tuple(screen),
            means=means,
            dropout_p=call.dropout,
            **_seen(call),
        )
        return Attended(output)

    def _choice(self, call: Call, screened: Screened) -> Selection:
        *screen, means = screened
        how = {"metric": call.score.metric, "means": means, **_seen(call)}
        return select_keys(*screen, self.budget, **how)

    def _loss(self, call: Call, screened: Screened) -> Tensor:
        """What the screening is to learn from what attention does."""
        queries, keys = call.queries.detach(), call.keys.detach()
        mask = call.mask if call.slots is None else seen_by(call)
        options: dict[str, Any] = {"score": call.score, "mask": mask, "rows": self.rows}
        return screening_loss(queries, keys, *screened[:2], **options)

    def _score(self) -> DotProduct | Gravity:
        if self.gravity is None:
            return DotProduct(self.scaling)
        return Gravity(*self.gravity(), law=self.gravity.law)

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def _turned(self, x: Tensor, norm: nn.RMSNorm | None, rotary: Rotary) -> Tensor:
        dtype = x.dtype
        if norm is not None:
            # Under autocast the weight is wider.
            x = norm(x.to(norm.weight.dtype))
        if rotary is not None:
            cos, sin = (table.unsqueeze(1) for table in rotary)
            x = x * cos + rotate_half(x) * sin
        # Under autocast cosines are float32.
        return x.to(dtype)

    def _add_map(
        self, name: str, config: LeanFormerConfig, width: int, out: int, bias: bool
    ) -> None:
        rank = config.rank_of(f"layers.{self.layer_idx}.self_attn.{name}", config.attention_rank)
        self.add_module(name, linear(width, out, rank, bias))

    def _add_screening(self, config: LeanFormerConfig) -> None:
        self.budget = KeyBudget(
            top_k=config.attention_top_k,
            block_size=config.attention_block,
            window=config.local_window,
            sinks=config.sink_tokens,
            min_length=config.sparse_min_length,
        )
        if self.learns_to_screen:
            shape = (self.heads, self.groups, self.head_dim, config.screen_dim)
            self.screening = Screening(*shape)


def _seen(call: Call) -> dict[str, Any]:
    """Arguments of `select_keys` and `sparse_attention`."""
    return {"mask": call.mask, "positions": call.slots, "origin": call.origin}
