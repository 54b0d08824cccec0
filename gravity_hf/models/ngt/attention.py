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

    Children: `gravity`; `v_proj`, `out_proj` `[D, D]`; `coord_proj` `[H c, C]`; where the config
    has them `anchor_proj` `[H c, C]` and `hidden_coord_proj` `[H c, D]`; `key_coord_proj`,
    `key_anchor_proj` and `key_hidden_coord_proj` of an asymmetric model.
    """

    def __init__(self, config: NGTConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.dropout = float(config.dropout)
        self.law, self.repulsive = config.law, config.repulsive
        self.exclude_self = config.exclude_self
        self.mass_in_value, self.asymmetric = config.mass_in_value, config.asymmetric
        self.has_anchors = config.anchor_coordinates
        self.reads_hidden = config.hidden_head_coordinates
        self.gravity = NGTGravity(config)
        width = config.hidden_size
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)
        self._add_maps(config, "")
        if config.asymmetric:
            self._add_maps(config, "key_")

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
        queries = self._mapped("", hidden, geometry)
        keys = self._mapped("key_", hidden, geometry) if self.asymmetric else queries
        return HeadCoordinates(queries, keys)

    def _add_maps(self, config: NGTConfig, side: str) -> None:
        width, own = config.coord_dim, config.num_attention_heads * config.head_coord_dim
        self.add_module(f"{side}coord_proj", Float32Linear(width, own))
        if self.has_anchors:
            self.add_module(f"{side}anchor_proj", Float32Linear(width, own, bias=False))
        if self.reads_hidden:
            from_hidden = nn.Linear(config.hidden_size, own, bias=False)
            self.add_module(f"{side}hidden_coord_proj", from_hidden)

    def shared_maps(self) -> Iterator[tuple[nn.Linear, nn.Linear]]:
        """The maps of queries and of keys that may start alike, in pairs."""
        for name in ("coord_proj", "anchor_proj", "hidden_coord_proj"):
            if f"key_{name}" in self._modules:
                yield self.get_submodule(name), self.get_submodule(f"key_{name}")

    def _mapped(self, side: str, hidden: Tensor, geometry: Geometry) -> Tensor:
        # A sum with coordinates is float32, whatever is added.
        own = getattr(self, f"{side}coord_proj")(geometry.coordinates)
        if self.has_anchors:
            own = own + getattr(self, f"{side}anchor_proj")(geometry.anchors)
        if self.reads_hidden:
            own = own + getattr(self, f"{side}hidden_coord_proj")(hidden)
        return own.view(*own.shape[:2], self.heads, -1).transpose(1, 2)


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
