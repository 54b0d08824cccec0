"""Attention of an LGT: token masses, and the force between tokens at their positions."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...layers.float32 import Float32, without_autocast
from ...layers.observing import Observer
from ...ops.reference import compute_dtype
from .call import LGTAttentionCall
from .configuration_lgt import LGTConfig
from .geometry import Geometry
from .law import Law


class LGTMasses(NamedTuple):
    """`mass` `[B, H, T]`, positive; `strength` `[H]`, `|G|`. At least float32."""

    mass: Tensor
    strength: Tensor


class LGTGravity(Float32):
    """What gives a head its gravity: `G` `[H]` and `mass_proj.weight` `[H, h]`.

    A child of its own, so that peft can train and store it: `modules_to_save=["gravity"]`, or
    LoRA on `mass_proj`.
    """

    def __init__(self, config: LGTConfig, layer_idx: int) -> None:
        super().__init__()
        self.heads, self.width = config.num_attention_heads, config.head_dim
        # Set only while somebody watches: its `attend(call)` decides what attention goes on with.
        self.observer: Observer | None = None
        self.layer_idx = layer_idx
        self.G = nn.Parameter(torch.ones(self.heads))
        self.mass_proj = nn.Linear(self.width, self.heads, bias=False)

    def initial_constants(self, config: LGTConfig) -> Tensor:
        """`[H]`: `G0 layer_decay^i head_decay^k`."""
        first = config.gravitational_constant * config.G_layer_decay**self.layer_idx
        constants = [first * config.G_head_decay**k for k in range(self.heads)]
        return torch.tensor(constants, dtype=compute_dtype(torch.get_default_dtype()))

    def forward(self, hidden: Tensor) -> LGTMasses:
        """`hidden` `[B, T, d]`; head k reads channels `[k h, (k + 1) h)`."""
        with without_autocast(hidden.device.type):
            slices = hidden.to(self.G.dtype).reshape(*hidden.shape[:2], self.heads, self.width)
            # Through the Linear as a whole, so that whatever wraps it counts; head k of row k.
            mass = self.mass_proj(slices).diagonal(dim1=-2, dim2=-1).transpose(1, 2)
            # Side by side in memory, as tokens are multiplied in rows of scores.
            return LGTMasses(F.softplus(mass.contiguous()), self.G.abs())


class AttentionResult(NamedTuple):
    """`output` `[B, Tq, d]`; `weights` `[B, H, Tq, Tk]` where asked for; `mass` `[B, H, Tq]`."""

    output: Tensor
    weights: Tensor | None
    mass: Tensor


class LGTAttention(nn.Module):
    """`out_proj` of what every head gathers: weights by force, values from the hidden state.

    Children: `gravity`, `out_proj` `[d, d]`, and `v_proj` where `config.value_projection`.
    """

    def __init__(self, config: LGTConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        self.gravity = LGTGravity(config, layer_idx)
        width = config.hidden_size
        self.v_proj = nn.Linear(width, width, bias=False) if config.value_projection else None
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(
        self,
        hidden: Tensor,
        geometry: Geometry,
        law: Law,
        cache: Any = None,
        output_attentions: bool = False,
    ) -> AttentionResult:
        """`hidden` `[B, T, d]`; `cache`: gets this layer's masses and values, gives all of them."""
        masses = self.gravity(hidden)
        value = hidden if self.v_proj is None else self.v_proj(hidden)
        value = value.reshape(*value.shape[:2], self.heads, self.head_dim).transpose(1, 2)
        key_mass = masses.mass
        if cache is not None:
            key_mass, value = remember(cache, self.layer_idx, key_mass, value, geometry.stored)
        call = LGTAttentionCall(
            self, masses.mass, key_mass, masses.strength, value, geometry, law, output_attentions
        )
        observer = self.gravity.observer
        output, weights = call.gravity() if observer is None else observer.attend(call)
        return AttentionResult(self.out_proj(output.flatten(2)), weights, masses.mass)


def remember(
    cache: Any, layer_idx: int, mass: Tensor, value: Tensor, places: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Append to a transformers cache; masses `[B, H, K]` and values `[B, H, K, h]` of all tokens.

    A token takes `d + H` numbers in each layer, and in the first one its position besides.
    """
    keys = mass.unsqueeze(-1)
    if layer_idx == 0:
        where = places[:, None, :, None].to(mass.dtype)
        keys = torch.cat([keys, where.expand_as(keys)], -1)
    dtype = value.dtype
    # Older caches of fixed size have one dtype for both, that of the keys.
    stored = value.to(mass.dtype) if cache.is_compileable else value
    keys, values = cache.update(keys, stored, layer_idx)
    return keys[..., 0], values.to(dtype)
