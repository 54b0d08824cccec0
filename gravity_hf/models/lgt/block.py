"""One layer of an LGT: attention by gravity, then a feed-forward network."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from .attention import LGTAttention
from .configuration_lgt import LGTConfig
from .geometry import Geometry
from .law import Law


class BlockOutput(NamedTuple):
    """`hidden` `[B, T, d]`; `weights` `[B, H, T, Tk]` where asked for; `mass` `[B, H, T]`."""

    hidden: Tensor
    weights: Tensor | None
    mass: Tensor


class LGTBlock(GradientCheckpointingLayer):
    """`x = norm1(x + attention(x)); x = norm2(x + ffn(x))`, dropout on both summands.

    The published block drops out the network's result twice; here it meets dropout once.
    """

    def __init__(self, config: LGTConfig, layer_idx: int) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.attn = LGTAttention(config, layer_idx)
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        hidden: Tensor,
        geometry: Geometry,
        law: Law,
        cache: Cache | None = None,
        output_attentions: bool = False,
    ) -> BlockOutput:
        attended = self.attn(hidden, geometry, law, cache, output_attentions)
        hidden = self.norm1(hidden + self._dropped(attended.output))
        inner = self._dropped(nn.functional.gelu(self.fc1(hidden)))
        hidden = self.norm2(hidden + self._dropped(self.fc2(inner)))
        return BlockOutput(hidden, attended.weights, attended.mass)

    def _dropped(self, x: Tensor) -> Tensor:
        return self.dropout(x) if self.dropout.training else x
