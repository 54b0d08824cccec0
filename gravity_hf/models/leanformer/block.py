"""One layer of a LeanFormer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from ...layers.low_rank import linear
from ...layers.sparse_feed_forward import SparseFeedForward
from .attention import LeanFormerAttention
from .compat_attention import PublishedAttention
from .configuration_leanformer import LeanFormerConfig
from .positions import Rotary, Tokens


class BlockOutput(NamedTuple):
    """`hidden` `[B, T, d]`; where asked for `weights` `[B, H, T, Tk]`, and what the screening and
    the predictor are to learn, scalars."""

    hidden: Tensor
    weights: Tensor | None = None
    screening_loss: Tensor | None = None
    gate_loss: Tensor | None = None


class LeanFormerBlock(GradientCheckpointingLayer):
    """`x = x + self_attn(input_layernorm(x))`; `x = x + mlp(post_attention_layernorm(x))`."""

    def __init__(self, config: LeanFormerConfig, layer_idx: int) -> None:
        super().__init__()
        attention = PublishedAttention if config.compat_reference else LeanFormerAttention
        self.self_attn = attention(config, layer_idx)
        self.mlp = _feed_forward(config, layer_idx)
        self.input_layernorm = norm_of(config)
        self.post_attention_layernorm = norm_of(config)
        self.dropout = nn.Dropout(config.dropout)
        # Set only while somebody watches: called with the network, what it reads, and
        # which tokens are no padding.
        self.observer: Callable[..., None] | None = None

    def forward(
        self,
        hidden: Tensor,
        tokens: Tokens,
        rotary: Rotary,
        cache: Any = None,
        how: str = "sdpa",
        output_attentions: bool = False,
        with_losses: bool = False,
    ) -> BlockOutput:
        """`hidden` `[B, T, d]`; `with_losses`: what the screening and the predictor learn, too."""
        attended = self.self_attn(
            *(self.input_layernorm(hidden), tokens, rotary, cache),
            *(how, output_attentions, with_losses),
        )
        hidden = hidden + attended.output
        read = self.post_attention_layernorm(hidden)
        if self.observer is not None:
            self.observer(self.mlp, read, tokens.real)
        if with_losses:
            inner, gate_loss = self.mlp.forward_with_loss(read, token_mask=tokens.real)
        else:
            inner, gate_loss = self.mlp(read), None
        hidden = hidden + self.dropout(inner)
        return BlockOutput(hidden, attended.weights, attended.screening_loss, gate_loss)

    def remember(self, hidden: Tensor, rotary: Rotary, cache: Any) -> None:
        """Keep keys and values of tokens that left before, `[B, T, d]`, in a cache."""
        self.self_attn.remember(self.input_layernorm(hidden), rotary, cache)


def norm_of(config: LeanFormerConfig) -> nn.Module:
    """Of the kind that the config asks for."""
    kind = nn.RMSNorm if config.norm == "rms" else nn.LayerNorm
    return kind(config.hidden_size, eps=config.norm_eps)


def _feed_forward(config: LeanFormerConfig, layer_idx: int) -> SparseFeedForward:
    width, inner = config.hidden_size, config.intermediate_size

    def projection(name: str, width: int, out: int) -> nn.Module:
        path = f"layers.{layer_idx}.mlp.{name}"
        return linear(width, out, config.rank_of(path, config.feed_forward_rank), config.mlp_bias)

    return SparseFeedForward(
        projection("gate_proj", width, inner),
        projection("up_proj", width, inner),
        projection("down_proj", inner, width),
        activation=ACT2FN[config.hidden_act],
        hidden_size=width,
        intermediate_size=inner,
        block_size=config.feed_forward_block,
        sparsity=float(config.feed_forward_sparsity),
        gate_rank=config.gate_rank,
        policy=config.feed_forward_policy,
    )
