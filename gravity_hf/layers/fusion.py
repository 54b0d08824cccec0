"""Three streams that read each other: world, self and environment."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

STREAMS = ("world", "self", "env")


class FusedStreams(NamedTuple):
    """Each `[B, N_stream, d]`."""

    world: Tensor
    self_: Tensor
    env: Tensor


class StreamMasses(NamedTuple):
    """`softplus(w.mean over tokens)`, each `[B]`: one scalar per sample and stream."""

    world: Tensor
    self_: Tensor
    env: Tensor


class CrossGravitationalFusion(nn.Module):
    """Every stream attends to the two others, scaled by the mass of each.

        M_s = softplus(w_s . mean_t x_s)          y_s = |G| M_s x_s
        fused_world = MHA_world(world, [y_self; y_env])
        fused_self = MHA_self(self, [y_world; y_env])
        fused_env = MHA_env(env, [y_world; y_self])

    Ordinary dot-product attention: there is no distance between streams, and the masses are scale
    factors. As published, a stream's own content reaches its output only as the query. With
    `use_gate` it stays:

        out_s = norm(x_s + sigmoid(gate([world; self; env])) fused_s)

    where the gate sees the token itself in its stream's place and the mean of the tokens in the two
    other places: `out_world` at t knows no other token of the world. The published module has
    `gate` and `norm` and never uses them; they are frozen here while `use_gate` is off.

    State: `G` `[]`, `{world,self,env}_cross_attn.*` (as `nn.MultiheadAttention`),
    `{world,self,env}_mass.weight` `[1, d]`, `gate.weight` `[d, 3d]`, `gate.bias`, `norm.*` `[d]`.

    Args:
        dim_model: `d`.
        num_heads: of the attention, a divisor of `d`.
        gravitational_constant: initial `G`. Its sign does not matter.
        dropout: of attention weights, and of what the gate lets through.
        use_gate: the residual form.
    """

    def __init__(
        self,
        dim_model: int,
        num_heads: int = 4,
        gravitational_constant: float = 1.0,
        dropout: float = 0.1,
        *,
        use_gate: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim_model % num_heads != 0:
            raise ValueError(
                f"dim_model ({dim_model}) must be divisible by num_heads ({num_heads}). Change one"
            )
        self.dim_model = dim_model
        self.use_gate = use_gate
        self.G = nn.Parameter(torch.tensor(float(gravitational_constant)))
        for name in STREAMS:
            attention = nn.MultiheadAttention(dim_model, num_heads, dropout, batch_first=True)
            setattr(self, f"{name}_cross_attn", attention)
        for name in STREAMS:
            setattr(self, f"{name}_mass", nn.Linear(dim_model, 1, bias=False))
        self.gate = nn.Linear(3 * dim_model, dim_model).requires_grad_(use_gate)
        self.norm = nn.LayerNorm(dim_model).requires_grad_(use_gate)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        world: Tensor,
        self_: Tensor,
        env: Tensor,
        *,
        world_mask: Tensor | None = None,
        self_mask: Tensor | None = None,
        env_mask: Tensor | None = None,
    ) -> FusedStreams:
        """The three streams, each read by the others.

        Args:
            world, self_, env: `[B, N_s, d]`; lengths may differ.
            world_mask, self_mask, env_mask: `[B, N_s]`, True or 1 = token, False or 0 = padding,
                which is neither attended to nor counted in the means. A token that sees nothing in
                either of the other streams gets nothing from them: zeros before the gate.
        """
        streams, masks = (world, self_, env), (world_mask, self_mask, env_mask)
        return FusedStreams(*(self.fuse(name, streams, masks) for name in STREAMS))

    def masses(
        self,
        streams: Sequence[Tensor],
        masks: Sequence[Tensor | None] = (None, None, None),
    ) -> StreamMasses:
        """The mass of each stream. Arguments: world, self, env."""
        return StreamMasses(
            *(self._mass(*each) for each in zip(STREAMS, streams, masks, strict=True))
        )

    def fuse(
        self,
        name: str,
        streams: Sequence[Tensor],
        masks: Sequence[Tensor | None] = (None, None, None),
    ) -> Tensor:
        """One stream, `"world"`, `"self"` or `"env"`, read with the two others: `[B, N_name, d]`.

        Arguments: world, self, env. Nothing of the stream's other tokens reaches a token.
        """
        own = _check_streams(name, streams, masks, self.dim_model)
        others = [i for i in range(3) if i != own]
        keys = torch.cat([self._heavy(STREAMS[i], streams[i], masks[i]) for i in others], dim=1)
        hidden, blind = _padding([streams[i] for i in others], [masks[i] for i in others])
        attention = getattr(self, f"{name}_cross_attn")
        fused, _ = attention(streams[own], keys, keys, key_padding_mask=hidden, need_weights=False)
        if blind is not None:
            fused = fused.masked_fill(blind[:, None, None], 0.0)
        if not self.use_gate:
            return fused
        places = [_mean(x, mask).unsqueeze(1) for x, mask in zip(streams, masks, strict=True)]
        places[own] = streams[own]
        seen = torch.cat([x.expand(-1, streams[own].shape[1], -1) for x in places], dim=-1)
        opened = torch.sigmoid(self.gate(seen))
        return self.norm(streams[own] + self.dropout(opened * fused))

    def _mass(self, name: str, stream: Tensor, mask: Tensor | None) -> Tensor:
        return F.softplus(getattr(self, f"{name}_mass")(_mean(stream, mask))).squeeze(-1)

    def _heavy(self, name: str, stream: Tensor, mask: Tensor | None) -> Tensor:
        return stream * (self.G.abs() * self._mass(name, stream, mask))[:, None, None]

    def extra_repr(self) -> str:
        return f"{self.dim_model}, use_gate={self.use_gate}"


def _mean(stream: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over real tokens `[B, d]`; 0 where there is none."""
    if mask is None:
        return stream.mean(1)
    real = mask.to(stream.dtype).unsqueeze(-1)
    return (stream * real).sum(1) / real.sum(1).clamp(min=1.0)


def _padding(
    streams: list[Tensor], masks: list[Tensor | None]
) -> tuple[Tensor | None, Tensor | None]:
    """`nn.MultiheadAttention`'s key_padding_mask `[B, N]`, and the samples `[B]` without any key.

    Those are shown all keys: softmax over nothing is not a number.
    """
    if all(mask is None for mask in masks):
        return None, None
    real = [
        x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
        for x, mask in zip(streams, masks, strict=True)
    ]
    hidden = ~torch.cat(real, dim=1)
    blind = hidden.all(1)
    return hidden & ~blind[:, None], blind


def _check_streams(
    name: str,
    streams: Sequence[Tensor],
    masks: Sequence[Tensor | None],
    width: int,
) -> int:
    if name not in STREAMS:
        raise ValueError(f"stream: expected one of {list(STREAMS)}, got {name!r}")
    for which, stream, mask in zip(STREAMS, streams, masks, strict=True):
        if stream.dim() != 3 or stream.shape[-1] != width or stream.shape[0] != len(streams[0]):
            raise ValueError(
                f"{which}: expected [B, N, {width}] with B = {len(streams[0])}, that of world, "
                f"got {tuple(stream.shape)}"
            )
        if stream.shape[1] == 0:
            raise ValueError(
                f"{which}: expected at least one token, got none. Give one, and a mask of zeros"
            )
        if mask is not None and mask.shape != stream.shape[:2]:
            raise ValueError(
                f"{which}_mask: expected {tuple(stream.shape[:2])}, 1 = token, 0 = padding, got "
                f"{tuple(mask.shape)}"
            )
    return STREAMS.index(name)
