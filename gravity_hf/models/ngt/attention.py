"""Attention of an NGT: head coordinates from what particles are and where, values from the text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..visibility import Visibility
from .call import NGTAttentionCall
from .configuration_ngt import NGTConfig
from .coordinates import Float32Linear, Geometry
from .gravity import NGTGravity


class AttentionResult(NamedTuple):
    """`output` `[B, T, D]`; `weights` `[B, H, T, Tk]` where asked for."""

    output: Tensor
    weights: Tensor | None


class HeadCoordinates(NamedTuple):
    """`[B, H, T, c]` of queries and keys; one tensor twice where they share their maps."""

    queries: Tensor
    keys: Tensor


class NGTAttention(nn.Module):
    """`out_proj` of what every head gathers: weights by gravity, values from the hidden state.

    Children: `gravity`; `v_proj`, `out_proj` `[D, D]`; `coord_proj` `[(H + K) c, C]`; where the
    config has them `anchor_proj` `[(H + K) c, C]` and `hidden_coord_proj` `[(H + K) c, D]`. These
    give the coordinates of all H heads' queries, and then those of the keys of the first K heads;
    in the other heads, in all of a symmetric model, keys are where queries are.
    """

    def __init__(self, config: NGTConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.dropout = float(config.dropout)
        self.law, self.repulsive = config.law, config.repulsive
        self.exclude_self = config.exclude_self
        self.mass_in_value, self.key_heads = config.mass_in_value, config.key_heads
        self.has_anchors = config.anchor_coordinates
        self.reads_hidden = config.hidden_head_coordinates
        self.gravity = NGTGravity(config)
        width = config.hidden_size
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        own = (self.heads + self.key_heads) * config.head_coord_dim
        # One product for queries and keys: these are small, and their number is what costs.
        self.coord_proj = Float32Linear(config.coord_dim, own)
        if self.has_anchors:
            self.anchor_proj = Float32Linear(config.coord_dim, own, bias=False)
        if self.reads_hidden:
            self.hidden_coord_proj = nn.Linear(width, own, bias=False)

    def forward(
        self,
        hidden: Tensor,
        geometry: Geometry,
        visible: Visibility,
        cache: Any = None,
        output_attentions: bool = False,
    ) -> AttentionResult:
        """`hidden` `[B, T, D]`, normalised; `cache`: gets this layer's keys and values, gives those
        of all tokens."""
        terms = self.gravity(geometry.masses, geometry.log_masses, geometry.times)
        queries, keys = self.head_coordinates(hidden, geometry)
        value = self.v_proj(hidden)
        value = value.view(*value.shape[:2], self.heads, self.head_dim).transpose(1, 2)
        if self.mass_in_value and geometry.masses is not None:
            value = value * geometry.masses[:, None, :, None].to(value.dtype)
        if cache is not None:
            # At most one of them is there.
            name = "key_mass" if terms.log_key_mass is None else "log_key_mass"
            mass = getattr(terms, name)
            keys, mass, value = remember(cache, self.layer_idx, keys, mass, value)
            terms = terms._replace(**{name: mass})
        how = (geometry.implementation, output_attentions)
        call = NGTAttentionCall(self, queries, keys, value, geometry, terms, visible, *how)
        observer = self.gravity.observer
        output, weights = call.gravity() if observer is None else observer.attend(call)
        return AttentionResult(self.out_proj(output.flatten(2)), weights)

    def head_coordinates(self, hidden: Tensor, geometry: Geometry) -> HeadCoordinates:
        """`[B, H, T, c]`, in the precision of the coordinates."""
        # A sum with coordinates is float32, whatever is added.
        own = self.coord_proj(geometry.coordinates)
        if self.has_anchors:
            own = own + self.anchor_proj(geometry.anchors)
        if self.reads_hidden:
            own = own + self.hidden_coord_proj(hidden)
        own = own.view(*own.shape[:2], self.heads + self.key_heads, -1).transpose(1, 2)
        if not self.key_heads:
            return HeadCoordinates(own, own)
        queries, keys = own.split((self.heads, self.key_heads), 1)
        if self.key_heads < self.heads:
            keys = torch.cat([keys, queries[:, self.key_heads :]], 1)
        return HeadCoordinates(queries, keys)

    def maps(self) -> Iterator[nn.Linear]:
        """To head coordinates."""
        yield self.coord_proj
        if self.has_anchors:
            yield self.anchor_proj
        if self.reads_hidden:
            yield self.hidden_coord_proj


def remember(
    cache: Any, layer_idx: int, keys: Tensor, mass: Tensor | None, value: Tensor
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Append to a transformers cache; keys `[B, H, K, c]`, masses `[B, H, K]` and values of all
    tokens.

    What is kept as a token's key is its head coordinates and, one entry more, its mass as the score
    has it.
    """
    dtype = value.dtype
    width = keys.shape[-1]
    if mass is not None:
        keys = torch.cat([keys, mass.unsqueeze(-1)], -1)
    # Older caches of fixed size have one dtype for both, that of the keys.
    stored = value.to(keys.dtype) if cache.is_compileable else value
    keys, values = cache.update(keys, stored, layer_idx)
    masses = None if mass is None else keys[..., width]
    return keys[..., :width], masses, values.to(dtype)
