"""Attention of an LGT: token masses, and the force between tokens at their positions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...layers.observing import Observer, RowSample, capped_force
from ...ops.api import gravity_attention
from ...ops.reference import gravity_attention_reference, own_position, split_mask, visible_keys
from .configuration_lgt import LGTConfig
from .geometry import Geometry

_HALF = (torch.float16, torch.bfloat16)
# What transformers calls an attention implementation, as the operator knows it. None: what
# `config.implementation` says.
_IMPLEMENTATIONS = {None: None, "sdpa": None, "eager": "reference", "flex_attention": "flex"}
_SMALLEST_STRENGTH = 1e-12


class Law(NamedTuple):
    """How forces become weights, read once per forward: a transformers config is slow to read."""

    power: bool
    max_force: float | None
    force_cap: str
    implementation: str

    @classmethod
    def of(cls, config: LGTConfig) -> Law:
        power, cap = config.force_law == "power", config.max_force
        # The power law's weights are forces, and need no ceiling.
        limit = None if power or cap is None else float(cap)
        return cls(power, limit, config.force_cap, implementation_of(config))


class Float32(nn.Module):
    """A module that stays float32 when its model is converted to half precision: a mass that is off
    by 0.4 % is another temperature, and a position another place."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Float32:
        def without_rounding(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            rounds = result.dtype in _HALF and tensor.dtype not in _HALF
            return tensor.to(result.device) if rounds else result

        return super()._apply(without_rounding, recurse)


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
        return torch.tensor([first * config.G_head_decay**k for k in range(self.heads)])

    def forward(self, hidden: Tensor) -> LGTMasses:
        """`hidden` `[B, T, d]`; head k reads channels `[k h, (k + 1) h)`."""
        # Under autocast the product would be rounded.
        with torch.autocast(hidden.device.type, enabled=False):
            slices = hidden.to(self.G.dtype).unflatten(-1, (self.heads, self.width))
            # Through the Linear as a whole, so that whatever wraps it counts; head k of row k.
            mass = F.softplus(self.mass_proj(slices).diagonal(dim1=-2, dim2=-1))
        return LGTMasses(mass.transpose(1, 2), self.G.abs())


class AttentionResult(NamedTuple):
    """`output` `[B, Tq, d]`; `weights` `[B, H, Tq, Tk]` where asked for; `mass` `[B, H, Tq]`."""

    output: Tensor
    weights: Tensor | None
    mass: Tensor


@dataclass(frozen=True, eq=False)
class LGTAttentionCall:
    """One call of `LGTAttention`, as an observer is shown it.

    query_mass `[B, H, Tq]`, key_mass `[B, H, Tk]`, strength `[H]`, value `[B, H, Tk, h]`.
    """

    module: LGTAttention
    query_mass: Tensor
    key_mass: Tensor
    strength: Tensor
    value: Tensor
    geometry: Geometry
    law: Law
    weights_asked: bool

    @property
    def max_force(self) -> float | None:
        """The cap on the force; the power law has none."""
        return self.law.max_force

    @property
    def force_cap(self) -> str:
        return self.law.force_cap

    def query_count(self) -> int:
        return self.query_mass.shape[-1]

    def masses(self) -> Tensor:
        """Of the queries, `[B, H, Tq]`."""
        return self.query_mass

    def gravity(self) -> tuple[Tensor, Tensor | None]:
        """`[B, Tq, H, h]`; the weights `[B, H, Tq, Tk]` where they are asked for, else None."""
        implementation = self.law.implementation
        batch, heads = self.value.shape[:2]
        q, k, options = self.geometry.distance_options(batch, heads)
        options = {**options, **self._masses(), **self.geometry.visible._asdict()}
        mass = options.pop("mass")
        if not self.weights_asked and implementation != "reference":
            output = gravity_attention(q, k, self.value, mass, impl=implementation, **options)
            return output.transpose(1, 2), None
        if isinstance(options["eps"], float):
            options["eps"] = mass.new_full(mass.shape, options["eps"])
        if q is not None:
            q, k = q.to(self.value.dtype), k.to(self.value.dtype)
        result = gravity_attention_reference(q, k, self.value, mass, **options)
        weights = result.weights if self.weights_asked else None
        return result.output.transpose(1, 2), weights

    def rows(self, rows: Tensor) -> RowSample:
        """Forces and scores of query rows by their indices, int64 `[R]`."""
        with torch.no_grad(), torch.autocast(self.value.device.type, enabled=False):
            inverse = self.geometry.inverse_rows(rows)
            strength = self.strength[:, None, None]
            if self.law.power:
                score = strength * (self.key_mass.unsqueeze(-2) * inverse).log()
                force = score.exp()
            else:
                own = (strength.squeeze(-1) * self.query_mass[:, :, rows]).unsqueeze(-1)
                force = own * self.key_mass.unsqueeze(-2) * inverse
                score = capped_force(force, self.max_force, self.force_cap)
            visible, bias = self._visible(rows)
            if bias is not None:
                score = score + bias.to(score.dtype)
            visible = visible.expand(*visible.shape[:2], *score.shape[-2:])
            return RowSample(force, score.masked_fill(~visible, _lowest(score)), visible)

    def _masses(self) -> dict[str, Any]:
        if self.law.power:
            # (m_j / D)^|G|. The root and its gradient are finite where G is 0.
            mass = self.strength.clamp(min=_SMALLEST_STRENGTH).sqrt()
            key_mass = self.key_mass ** self.strength[:, None]
            return {"law": "power", "mass": mass, "key_mass": key_mass}
        return {
            "mass": torch.ones_like(self.strength),
            "query_mass": self.strength[:, None] * self.query_mass,
            "key_mass": self.key_mass,
            "max_force": self.law.max_force,
            "force_cap": self.law.force_cap,
        }

    def _visible(self, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        """Bool and bias of the rows, broadcastable to `[B, H, R, Tk]`."""
        seen = self.geometry.visible
        queries, keys = self.query_count(), self.key_mass.shape[-1]
        device = self.value.device
        allowed = visible_keys(
            queries, keys, causal=seen.causal, key_ranges=seen.key_ranges, device=device
        )
        bias = None
        if allowed is None:
            allowed = torch.ones(1, 1, queries, 1, dtype=torch.bool, device=device)
        allowed = allowed[:, :, rows]
        if seen.mask is not None:
            mask, bias = split_mask(seen.mask)
            mask, bias = (_rows_of(x, rows) for x in (mask, bias))
            bias = None if bias is None else bias.masked_fill(~mask, 0.0)
            allowed = allowed & mask
        if seen.exclude_self:
            own = own_position(queries, keys, device)[rows]
            others = allowed & ~own
            allowed = others | (allowed & own & ~others.any(-1, keepdim=True))
        return allowed, bias


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
        value = value.unflatten(-1, (self.heads, self.head_dim)).transpose(1, 2)
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


def implementation_of(config: LGTConfig) -> str:
    """The operator's implementation that the model's attention implementation stands for."""
    name = config._attn_implementation
    if name not in _IMPLEMENTATIONS:
        known = [x for x in _IMPLEMENTATIONS if x]
        raise ValueError(f"attn_implementation: an LGT has {known}, got {name!r}")
    return _IMPLEMENTATIONS[name] or config.implementation


def _rows_of(mask: Tensor | None, rows: Tensor) -> Tensor | None:
    if mask is None:
        return None
    mask = mask[(None,) * (4 - mask.dim())]
    return mask if mask.shape[2] == 1 else mask[:, :, rows]


def _lowest(score: Tensor) -> float:
    return torch.finfo(score.dtype).min
