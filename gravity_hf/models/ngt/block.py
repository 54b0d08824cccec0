"""One layer of an NGT: attention, a feed-forward network, and the motion of coordinates."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from ..visibility import Visibility
from .attention import NGTAttention
from .configuration_ngt import NGTConfig
from .coordinates import Float32LayerNorm, Geometry
from .dot_product import DotProductAttention


class BlockOutput(NamedTuple):
    """`hidden` `[B, T, D]`; `coordinates` `[B, T, C]`, None of a twin; `weights` `[B, H, T, Tk]`
    where asked for."""

    hidden: Tensor
    coordinates: Tensor | None
    weights: Tensor | None


class NGTBlock(GradientCheckpointingLayer):
    """`h = h + a`, `a = attn(norm1(h))`; `h = h + ffn(norm2(h))`; `z = coord_norm(z + motion)`.

    What moves coordinates is `config.coordinate_source`: `coord_proj_next` reads `a`, or `norm1(h)`
    with `"pre_attention"`; `coord_proj_hidden` reads `norm2(h)`, as the network does. A layer that
    moves nothing has neither of them and no `coord_norm`.
    """

    def __init__(self, config: NGTConfig, layer_idx: int) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        attention = DotProductAttention if config.is_twin else NGTAttention
        self.attn = attention(config, layer_idx)
        self.norm1 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.norm2 = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(width, inner)
        self.fc2 = nn.Linear(inner, width)
        self.dropout = nn.Dropout(config.dropout)
        self.source = config.coordinate_source if config.moves_coordinates(layer_idx) else "none"
        if self.source != "none":
            self.coord_proj_next = nn.Linear(width, config.coord_dim)
            self.coord_norm = Float32LayerNorm(config.coord_dim, eps=config.layer_norm_eps)
        if self.source == "hidden":
            self.coord_proj_hidden = nn.Linear(width, config.coord_dim, bias=False)

    def forward(
        self,
        hidden: Tensor,
        geometry: Geometry | None,
        visible: Visibility,
        cache: Any = None,
        output_attentions: bool = False,
    ) -> BlockOutput:
        normed = self.norm1(hidden)
        attended = self.attn(normed, geometry, visible, cache, output_attentions)
        hidden = hidden + attended.output
        read = self.norm2(hidden)
        inner = self._dropped(nn.functional.gelu(self.fc1(read)))
        hidden = hidden + self._dropped(self.fc2(inner))
        coordinates = None
        if geometry is not None:
            by = normed if self.source == "pre_attention" else attended.output
            coordinates = self._moved(geometry.coordinates, by, read)
        return BlockOutput(hidden, coordinates, attended.weights)

    def _moved(self, coordinates: Tensor, by: Tensor, read: Tensor) -> Tensor:
        """A sum with coordinates is float32, whatever is added."""
        if self.source == "none":
            return coordinates
        coordinates = coordinates + self.coord_proj_next(by)
        if self.source == "hidden":
            coordinates = coordinates + self.coord_proj_hidden(read)
        return self.coord_norm(coordinates)

    def _dropped(self, x: Tensor) -> Tensor:
        return self.dropout(x) if self.dropout.training else x
