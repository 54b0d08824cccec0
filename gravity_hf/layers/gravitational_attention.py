"""The attention of the Lightweight Gravitational Transformer, as modules of their own.

Published names, constructors and state keys; `softening=0.0` is the published law, number for
number. The default, 0.2, is one that mixes tokens: `gravity_hf.layers.distance`.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..ops.api import gravity_attention
from ..ops.reference import compute_dtype, split_mask, visible_keys
from .distance import check_space, inverse_distance, squared_distances
from .forces import force_statistics, gravitational_forces


class GravitationalAttentionHead(nn.Module):
    """One head: `softmax_j(min(|G| m_i m_j / D_ij, max_force)) x_j`, `m = softplus(w.x)`.

    `D` is the curved distance between positions (`gravity_hf.layers.distance`), and 1 where no
    positions are given. Values are the head's inputs themselves.

    State: `G` `[]`, `mass_proj.weight` `[1, h]`.

    Args:
        head_dim: `h`.
        gravitational_constant: initial `G`. Its sign does not matter.
        event_horizon: least squared distance, and softening of the root within the curvature.
        max_force: ceiling of the force; None: no ceiling.
        curvature: of the space in which distances are measured.
        softening: added to `D`, squared distance. 0: the published law, under which a token sees
            itself and next to nothing else.
        is_causal: token i sees tokens `j <= i`.
    """

    def __init__(
        self,
        head_dim: int,
        gravitational_constant: float = 1.0,
        event_horizon: float = 1e-6,
        max_force: float | None = 50.0,
        curvature: float = 0.15,
        *,
        softening: float = 0.2,
        is_causal: bool = False,
    ) -> None:
        super().__init__()
        check_space(curvature, event_horizon, softening)
        self.head_dim = head_dim
        self.event_horizon = event_horizon
        self.max_force = max_force
        self.curvature = curvature
        self.softening = softening
        self.is_causal = is_causal
        self.G = nn.Parameter(torch.tensor(float(gravitational_constant)))
        self.mass_proj = nn.Linear(head_dim, 1, bias=False)

    @property
    def law(self) -> tuple[Any, ...]:
        """What two heads must share to be computed as one call."""
        space = (self.curvature, self.event_horizon, self.softening)
        return (*space, self.max_force, self.is_causal)

    def masses(self, x: Tensor) -> Tensor:
        """`softplus(w.x)` `[B, N]`, positive, in the dtype of scores."""
        projected = self.mass_proj(x)
        return F.softplus(projected.to(compute_dtype(projected.dtype))).squeeze(-1)

    def inverse_distances(self, x: Tensor, positions: Tensor | None) -> Tensor:
        """`R` `[N, N]` for inputs `[B, N, ...]`."""
        if positions is None:
            length = x.shape[1]
            return x.new_ones(length, length, dtype=compute_dtype(x.dtype))
        return inverse_distance(
            squared_distances(positions, positions, exact=True),
            curvature=self.curvature,
            event_horizon=self.event_horizon,
            softening=self.softening,
        )

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Outputs `[B, N, h]` and masses `[B, N]`.

        Args:
            x: `[B, N, h]`.
            positions: `[N, P]`, the same for the whole batch; None: all are equally far.
            key_padding_mask: bool `[B, N]`, True = padding, as in `nn.MultiheadAttention`.
            mask: broadcastable to `[B, 1, N, N]`; bool: True = attend; float: added to the force.

        Raises:
            ValueError: shapes that do not fit.
        """
        _check_inputs(x, self.head_dim, positions)
        masses = self.masses(x)[:, None]
        table = self.inverse_distances(x, positions)
        seen = _visible(x, mask, key_padding_mask)
        out = _attend(x[:, None], masses, self.G.abs()[None], table, self, seen)
        return out[:, 0], masses[:, 0].to(x.dtype)

    def extra_repr(self) -> str:
        return (
            f"max_force={self.max_force}, curvature={self.curvature}, softening={self.softening}, "
            f"event_horizon={self.event_horizon}, is_causal={self.is_causal}"
        )


class MultiHeadGravitationalAttention(nn.Module):
    """`H` heads, each on its own slice of the channels, and an output projection without bias.

    State: `heads.{k}.G` `[]`, `heads.{k}.mass_proj.weight` `[1, h]`, `out_proj.weight` `[d, d]`.

    Args:
        dim_model: `d`.
        dim_position: kept for the reader; positions may have any width.
        num_heads: `H`, a divisor of `d`.
        gravitational_constant: initial `G` of head 0.
        event_horizon, max_force, curvature, softening, is_causal: as in
            `GravitationalAttentionHead`.
        different_G_per_head: head `k` begins with `G 0.9^k`; otherwise all begin with `G`.

    Raises:
        ValueError: `dim_model` is not a multiple of `num_heads`.
    """

    def __init__(
        self,
        dim_model: int,
        dim_position: int = 64,
        num_heads: int = 4,
        gravitational_constant: float = 1.0,
        event_horizon: float = 1e-6,
        max_force: float | None = 50.0,
        curvature: float = 0.15,
        different_G_per_head: bool = True,  # noqa: N803 (the published name)
        *,
        softening: float = 0.2,
        is_causal: bool = False,
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim_model % num_heads != 0:
            raise ValueError(
                f"dim_model ({dim_model}) must be divisible by num_heads ({num_heads}), one slice "
                "of the channels for each head. Change one of them"
            )
        self.dim_model = dim_model
        self.dim_position = dim_position
        self.num_heads = num_heads
        self.head_dim = dim_model // num_heads
        decay = 0.9 if different_G_per_head else 1.0
        self.heads = nn.ModuleList(
            GravitationalAttentionHead(
                self.head_dim,
                gravitational_constant * decay**head,
                event_horizon,
                max_force,
                curvature,
                softening=softening,
                is_causal=is_causal,
            )
            for head in range(num_heads)
        )
        self.out_proj = nn.Linear(dim_model, dim_model, bias=False)

    def forward(
        self,
        x: Tensor,
        positions: Tensor | None = None,
        *,
        key_padding_mask: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """`[B, N, d]` from `[B, N, d]`; arguments as in `GravitationalAttentionHead.forward`, with
        `mask` broadcastable to `[B, H, N, N]`."""
        _check_inputs(x, self.dim_model, positions)
        seen = _visible(x, mask, key_padding_mask)
        values = x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)
        parts = [self._attended(group, values, positions, seen) for group in self._groups()]
        mixed = torch.cat(parts, dim=1)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))

    def get_attention_diagnostics(
        self,
        x: Any,
        positions: Any = None,
        *,
        key_padding_mask: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> dict[str, dict[str, float]]:
        """What the heads do with `x`: `{"head_0": {...}, ...}`, Python floats; no gradients.

        Of the forces themselves, over the pairs that the masks leave visible: `force_mean` and
        `force_max` before the ceiling; `saturation`, the share of pairs at or above it;
        `attention_entropy`, in nats, mean over tokens (0: every token sees one only).

        As published: `mean_mass`; `G`, its absolute value; `curvature`; and `mean_force = |G|
        mean_mass^2`, which knows of no distance: it is not a mean of forces.

        Args:
            x: tensor or numpy array `[B, N, d]`.
            positions: tensor or numpy array `[N, P]`, or None.
            key_padding_mask, mask: as in `forward`.
        """
        weight = self.out_proj.weight
        x = torch.as_tensor(x).to(weight)
        positions = None if positions is None else torch.as_tensor(positions).to(weight)
        _check_inputs(x, self.dim_model, positions)
        seen = _visible(x, mask, key_padding_mask)
        found: dict[str, dict[str, float]] = {}
        parts = x.split(self.head_dim, dim=-1)
        with torch.no_grad():
            for index, (head, part) in enumerate(zip(self._all_heads(), parts, strict=True)):
                of_head = _of_heads(seen, slice(index, index + 1))
                found[f"head_{index}"] = _diagnose(head, part, positions, of_head)
        return found

    def _all_heads(self) -> list[GravitationalAttentionHead]:
        return cast(list[GravitationalAttentionHead], list(self.heads))

    def _groups(self) -> list[slice]:
        """Runs of heads under one law: a single one, unless somebody has set a head apart."""
        laws = [head.law for head in self._all_heads()]
        starts = [i for i in range(len(laws)) if i == 0 or laws[i] != laws[i - 1]]
        return [slice(i, j) for i, j in zip(starts, [*starts[1:], len(laws)], strict=True)]

    def _attended(
        self, group: slice, values: Tensor, positions: Tensor | None, seen: Tensor | None
    ) -> Tensor:
        heads, values = self._all_heads()[group], values[:, group]
        # Called one by one, so that adapters and quantised layers have their say.
        each = [head.masses(part) for head, part in zip(heads, values.unbind(1), strict=True)]
        strength = torch.stack([head.G.abs() for head in heads])
        table = heads[0].inverse_distances(values[:, 0], positions)
        masses = torch.stack(each, dim=1)
        return _attend(values, masses, strength, table, heads[0], _of_heads(seen, group))


def _attend(
    values: Tensor,
    masses: Tensor,
    strength: Tensor,
    table: Tensor,
    head: GravitationalAttentionHead,
    mask: Tensor | None,
) -> Tensor:
    """`[B, H, N, h]`. `|G|` goes with the queries' masses: as `M^2` it would need a root, which
    has no derivative at 0."""
    heavy = strength.to(masses.dtype)[:, None] * masses
    return gravity_attention(
        None,
        None,
        values,
        torch.ones_like(strength, dtype=masses.dtype),
        eps=None,
        query_mass=heavy,
        key_mass=masses,
        max_force=head.max_force,
        inverse_distance=table,
        mask=mask,
        causal=head.is_causal,
    )


def _diagnose(
    head: GravitationalAttentionHead,
    x: Tensor,
    positions: Tensor | None,
    mask: Tensor | None,
) -> dict[str, float]:
    masses, strength = head.masses(x), head.G.abs()
    table = head.inverse_distances(x, positions)
    force = gravitational_forces(masses[:, None], strength[None].to(masses.dtype), table)
    score = force if head.max_force is None else force.clamp(max=head.max_force)
    length = x.shape[1]
    visible = visible_keys(length, length, causal=head.is_causal, device=x.device)
    if mask is not None:
        attend, bias = split_mask(mask)
        score = score if bias is None else score + bias.masked_fill(~attend, 0.0)
        visible = attend if visible is None else visible & attend
    visible = torch.ones((), dtype=torch.bool, device=x.device) if visible is None else visible
    mean_mass = float(masses.mean())
    return {
        "mean_mass": mean_mass,
        "mean_force": float(strength) * mean_mass**2,
        "G": float(strength),
        "curvature": head.curvature,
        **force_statistics(force, score, visible, head.max_force),
    }


def _of_heads(mask: Tensor | None, group: slice) -> Tensor | None:
    """The part of a mask `[B|1, H|1, ...]` that these heads have."""
    return mask if mask is None or mask.shape[1] == 1 else mask[:, group]


def _visible(x: Tensor, mask: Tensor | None, key_padding_mask: Tensor | None) -> Tensor | None:
    """Both masks as one with four dimensions, in the operator's convention."""
    if mask is not None:
        mask = mask[(None,) * max(0, 4 - mask.dim())]
    if key_padding_mask is None:
        return mask
    if key_padding_mask.dtype != torch.bool or key_padding_mask.shape != x.shape[:2]:
        raise ValueError(
            f"key_padding_mask: expected bool {tuple(x.shape[:2])}, True = padding, got "
            f"{key_padding_mask.dtype} {tuple(key_padding_mask.shape)}. An attention_mask of ones "
            "and zeros becomes one by attention_mask == 0"
        )
    real = ~key_padding_mask[:, None, None]
    if mask is None:
        return real
    return mask & real if mask.dtype == torch.bool else mask.masked_fill(~real, -torch.inf)


def _check_inputs(x: Tensor, width: int, positions: Tensor | None) -> None:
    if x.dim() != 3 or x.shape[-1] != width or not x.is_floating_point():
        raise ValueError(
            f"x: expected floats [B, N, {width}], got {x.dtype} {tuple(x.shape)}. Embed token ids "
            "first"
        )
    if positions is None:
        return
    if positions.dim() != 2 or positions.shape[0] != x.shape[1]:
        raise ValueError(
            f"positions: expected [N, P] with N = {x.shape[1]}, shared by the whole batch, got "
            f"{tuple(positions.shape)}. Give one row for every token"
        )
