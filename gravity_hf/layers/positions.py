"""Positions as points in space. They enter a model only through the distances between them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

# The wave in `q (1 + curvature sin(0.1 q))`.
_WAVE = 0.1


class _PositionTable(nn.Module):
    """What the two embeddings share: which rows a call asks for."""

    def __init__(self, max_seq_len: int, dim_position: int) -> None:
        super().__init__()
        for name, value in (("max_seq_len", max_seq_len), ("dim_position", dim_position)):
            if value < 1:
                raise ValueError(f"{name}: expected a number >= 1, got {value!r}")
        self.max_seq_len = max_seq_len
        self.dim_position = dim_position

    def _rows(self, table: Tensor, which: int | Tensor) -> Tensor:
        """The first `which` rows of `[T, P]`, or those of the positions in `which`."""
        if not isinstance(which, Tensor):
            if not 0 <= which <= self.max_seq_len:
                raise ValueError(self._too_long(f"a sequence of {which}"))
            return table[:which]
        if which.is_floating_point() or which.is_complex() or which.dtype == torch.bool:
            raise ValueError(
                f"positions: expected integers, got {which.dtype}. Give a length or position_ids"
            )
        # Elsewhere looking would stop the device; there an index beyond the table is its error.
        if which.device.type == "cpu" and which.numel() and not torch.compiler.is_compiling():
            low, high = (int(bound) for bound in which.aminmax())
            if low < 0 or high >= self.max_seq_len:
                raise ValueError(self._too_long(f"positions from {low} to {high}"))
        return table[which]

    def _too_long(self, got: str) -> str:
        return (
            f"positions: expected at most max_seq_len = {self.max_seq_len} of them, 0 to "
            f"{self.max_seq_len - 1}, got {got}. Shorten the input, or build the model with a "
            "larger max_seq_len"
        )

    def extra_repr(self) -> str:
        return f"{self.max_seq_len}, {self.dim_position}"


class CurvedPositionEmbedding(_PositionTable):
    """Learned points `q`, seen as `q (1 + curvature_scale sin(0.1 q))`, elementwise.

    State: `positions` `[T, P]` ~ N(0, 0.02^2); `curvature_scale` `[]`. At that size of `q` the
    second factor differs from 1 by about 3e-4: the scale hardly does anything until positions grow.

    Args:
        max_seq_len: `T`.
        dim_position: `P`.
        curvature: initial `curvature_scale`. The curvature of attention is another number.
    """

    def __init__(self, max_seq_len: int, dim_position: int, curvature: float = 0.15) -> None:
        super().__init__(max_seq_len, dim_position)
        self.positions = nn.Parameter(torch.randn(max_seq_len, dim_position) * 0.02)
        self.curvature_scale = nn.Parameter(torch.tensor(float(curvature)))

    def forward(self, which: int | Tensor) -> Tensor:
        """A length `n`: `[n, P]`. Integer positions `[...]`: `[..., P]`."""
        q = self._rows(self.positions, which)
        return q * (1.0 + self.curvature_scale * torch.sin(_WAVE * q))


class FractalPositionEmbedding(_PositionTable):
    """Sines and cosines in bands of frequencies that grow as `scale_factor^(k fractal_dim)`.

    A larger `fractal_dim` spreads the bands. Band `k` starts at `base_freq
    scale_factor^(k fractal_dim)` radians per token; what exceeds pi there aliases: see
    `aliased_frequencies`, 3 of the 32 by default at `P = 64`.

    State: `scale` `[1]`, `residual` `[T, P]` (None without `learnable_residual`), `curvature` `[]`,
    `basis` `[T, P]` (buffer). Squared distances are about `P` times as large as those of a new
    `CurvedPositionEmbedding`.

    Args:
        max_seq_len: `T`.
        dim_position: `P`.
        num_scales: bands.
        fractal_dim: exponent of the bands' frequencies.
        base_freq: first band's highest frequency, radians per token.
        scale_factor: from band to band.
        learnable_residual: adds learned points to the fixed ones.
    """

    residual: nn.Parameter | None
    basis: Tensor

    def __init__(
        self,
        max_seq_len: int,
        dim_position: int,
        num_scales: int = 4,
        fractal_dim: float = 1.5,
        base_freq: float = 1.0,
        scale_factor: float = 2.0,
        learnable_residual: bool = True,
    ) -> None:
        super().__init__(max_seq_len, dim_position)
        if num_scales < 1:
            raise ValueError(f"num_scales: expected a number >= 1, got {num_scales!r}")
        self.num_scales = num_scales
        self.fractal_dim = fractal_dim
        self.base_freq = base_freq
        self.scale_factor = scale_factor
        self.scale = nn.Parameter(torch.ones(1))
        self.residual = None
        if learnable_residual:
            self.residual = nn.Parameter(torch.zeros(max_seq_len, dim_position))
        self.curvature = nn.Parameter(torch.tensor(0.1))
        self.register_buffer("basis", self.compute_basis())

    def frequencies(self) -> Tensor:
        """`[num_scales, half]` radians per token, float32, the highest of a band first."""
        half = max(2, self.dim_position // self.num_scales // 2 * 2) // 2
        bands = [
            self.base_freq * self.scale_factor ** (band * self.fractal_dim)
            for band in range(self.num_scales)
        ]
        within = torch.pow(10000.0, torch.arange(half, dtype=torch.float32) / half)
        return torch.stack([band / within for band in bands])

    @property
    def aliased_frequencies(self) -> int:
        """How many frequencies turn by more than pi from one token to the next."""
        return int((self.frequencies() > math.pi).sum())

    def compute_basis(self) -> Tensor:
        """`[T, P]`: per band the sines, then the cosines; padded with zeros or cut to `P`."""
        time = torch.arange(self.max_seq_len, dtype=torch.float32)
        angles = time[:, None, None] * self.frequencies()
        basis = torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(1)
        missing = max(0, self.dim_position - basis.shape[1])
        return nn.functional.pad(basis, (0, missing))[:, : self.dim_position].contiguous()

    def forward(self, which: int | Tensor) -> Tensor:
        """A length `n`: `[n, P]`. Integer positions `[...]`: `[..., P]`."""
        q = self._rows(self.basis, which) * self.scale
        if self.residual is not None:
            q = q + self._rows(self.residual, which)
        return q * (1.0 + self.curvature * torch.sin(_WAVE * q))
