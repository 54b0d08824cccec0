"""Omega, the spectrum of a lifted frame, and the layers in which spectra attend across tokens.

All of it is float32 in models of half precision too: its weights are few, and what it does to a
spectrum are changes of some percent.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from ...layers.float32 import Float32, without_autocast
from ...ops.api import gravity_attention
from .configuration_geolip import GeolipConfig
from .gravity import SpectralGravity

# Singular values below this share of the largest one are no information.
_RANK_TOLERANCE = 1e-10


def omega_of(lens_frame: Tensor) -> Tensor:
    """Lengths of the columns of lifted frames `[..., V, D]`: `[..., D]`.

    They are not singular values. Their squares sum to V, and they do not feel the order of rows or
    their signs.
    """
    return torch.linalg.vector_norm(lens_frame, dim=-2)


def gram_from_omega(omega: Tensor, basis: Tensor) -> Tensor:
    """`G = M^T M` `[..., d, d]`, float64, of the frames that `omega` `[..., D]` was measured of.

    `S_j^2 = e_j^T G e_j` with `e_j` the rows of the lens `basis` `[D, d]`: D linear equations for
    the `d (d + 1) / 2` entries of G.

    Raises:
        ValueError: equations that do not determine G, as where `D < d (d + 1) / 2`.
    """
    lens = basis.detach().double()
    count, dim = lens.shape
    rows, columns = torch.triu_indices(dim, dim, device=lens.device)
    twice = torch.where(rows == columns, 1.0, 2.0).to(lens)
    equations = lens[:, rows] * lens[:, columns] * twice
    rank = int(torch.linalg.matrix_rank(equations, rtol=_RANK_TOLERANCE))
    if rank < rows.numel():
        raise ValueError(
            f"gram_from_omega: expected a lens whose {count} modes determine the {rows.numel()} "
            f"entries of a Gram matrix of {dim} dimensions, got {rank} independent equations. Take "
            f"lens_dim >= {rows.numel()}"
        )
    entries = omega.double().square() @ torch.linalg.pinv(equations).T
    gram = entries.new_zeros(*omega.shape[:-1], dim, dim)
    gram[..., rows, columns] = entries
    gram[..., columns, rows] = entries
    return gram


class Visible(NamedTuple):
    """Who sees whom in a spectral layer.

    mask: bool, True = seen, broadcastable to `[B, H, N, Tk]`, or None: all. causal: beside it, a
    token sees no later one. swapped: keys are those of the next sample of the batch, then the own
    ones, `Tk = 2 N`, and the mask says all, causality included.
    """

    mask: Tensor | None
    causal: bool
    swapped: bool

    @classmethod
    def of(
        cls, attention_mask: Tensor | None, omega: Tensor, *, causal: bool, swapped: bool
    ) -> Visible:
        """`attention_mask` `[B, N]`, 0 for tokens that are none; `omega` `[B, N, D]`."""
        keys = None if attention_mask is None else (attention_mask != 0)[:, None, None]
        if not swapped:
            return cls(keys, causal, False)
        count, device = omega.shape[1], omega.device
        own = torch.eye(count, dtype=torch.bool, device=device)
        others = ~own
        if causal:
            others = others.tril()
        seen = torch.cat([others, own], -1)[None, None]
        if keys is not None:
            seen = seen & torch.cat([keys.roll(-1, 0), keys], -1)
        return cls(seen, False, True)


class SpectralLayer(Float32, GradientCheckpointingLayer):
    """`S (1 + alpha tanh(out_proj(attention(qkv(norm(S))))))`, alpha in (0, max_alpha) per mode.

    With `max_alpha` 0.2 a layer scales each mode by 0.8 to 1.2, and S stays positive.

    State: `norm.*` `[D]`; `qkv.*` `[3 D, D]`; `out_proj.*` `[D, D]`; `alpha_logits` `[D]`; with
    gravity `gravity.*`, see `SpectralGravity`.
    """

    def __init__(self, config: GeolipConfig) -> None:
        super().__init__()
        width = config.lens_dim
        self.heads, self.max_alpha = config.num_attention_heads, config.max_alpha
        self.alpha_init, self.law = float(config.alpha_init), config.gravity_law
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.alpha_logits = nn.Parameter(torch.full((width,), self.alpha_init))
        has_gravity = config.spectral_attention == "gravity"
        self.gravity = SpectralGravity(config) if has_gravity else None

    def alpha(self) -> Tensor:
        """`[D]`."""
        return self.max_alpha * self.alpha_logits.sigmoid()

    def forward(
        self, omega: Tensor, visible: Visible, implementation: str = "auto"
    ) -> tuple[Tensor, Tensor]:
        """Omega `[B, N, D]` after the layer, and alpha `[D]`."""
        with without_autocast(omega.device.type):
            parts = self.qkv(self.norm(omega)).chunk(3, -1)
            q, k, v = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in parts)
            if visible.swapped:
                k, v = (torch.cat([x.roll(-1, 0), x], 2) for x in (k, v))
            if self.gravity is None:
                gathered = _dot_product(q, k, v, visible)
            else:
                gathered = self.gravity_attention(q, k, v, visible, implementation)
            change = self.out_proj(gathered.transpose(1, 2).flatten(2)).tanh()
            alpha = self.alpha()
            return omega * (1.0 + alpha * change), alpha

    def gravity_attention(
        self, q: Tensor, k: Tensor, v: Tensor, visible: Visible, implementation: str
    ) -> Tensor:
        """`[B, H, N, D / H]`."""
        terms = self.gravity()
        return gravity_attention(
            q,
            k,
            v,
            terms.mass,
            eps=terms.softening,
            law=self.law,
            mask=visible.mask,
            causal=visible.causal,
            impl=implementation,
        )


class SpectralStack(nn.Module):
    """The spectral layers, one after another. State: `layers.{i}.*`."""

    def __init__(self, config: GeolipConfig) -> None:
        super().__init__()
        count = config.num_spectral_layers if config.use_spectral else 0
        self.layers = nn.ModuleList(SpectralLayer(config) for _ in range(count))
        self.width = config.lens_dim

    def alphas(self) -> Tensor:
        """`[L, D]`, float32, without gradients."""
        if not self.layers:
            return torch.zeros(0, self.width)
        return torch.stack([layer.alpha().detach().float() for layer in self.layers])

    def forward(
        self, omega: Tensor, visible: Visible, implementation: str
    ) -> tuple[Tensor, Tensor | None]:
        """Omega after all layers, and the mean of alpha; None where there is no layer."""
        alphas = []
        for layer in self.layers:
            omega, alpha = layer(omega, visible, implementation)
            alphas.append(alpha.detach())
        return omega, torch.stack(alphas).mean() if alphas else None


def _dot_product(q: Tensor, k: Tensor, v: Tensor, visible: Visible) -> Tensor:
    mask, causal = visible.mask, visible.causal
    if mask is not None and causal:
        count = q.shape[2]
        mask = mask & torch.ones(count, count, dtype=torch.bool, device=q.device).tril()
        causal = False
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
