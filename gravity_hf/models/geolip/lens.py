"""The lens: an isometry that lifts frames into more dimensions, always float32 or more."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ...layers.float32 import Float32, without_autocast
from .configuration_geolip import GeolipConfig
from .frames import canonical

# Of `E^T E`, of dimension 4: bfloat16 makes up to 0.005 of a lens.
_LARGEST_ERROR = 0.01


class Lens(Float32):
    """`M E^T` with `E^T E = 1`: Gram matrices, angles and singular values of frames stay.

    State: `basis` `[D, d]`. With `lens_mode="fixed"` a buffer: `E` itself. With `"learned"` a
    parameter of full rank, whose orthonormal factor is `E`, computed anew in each call.
    """

    basis: Tensor

    def __init__(self, config: GeolipConfig) -> None:
        super().__init__()
        self.sizes, self.seed = (config.lens_dim, config.base_dim), config.lens_seed
        self.is_learned = config.lens_mode == "learned"
        self.is_canonical = config.lens_sign != "signed"
        start = self.start()
        if self.is_learned:
            self.basis = nn.Parameter(start)
        else:
            self.register_buffer("basis", start)

    def start(self) -> Tensor:
        """`E` of a new model, on the CPU."""
        return seeded_lens(*self.sizes, self.seed)

    def matrix(self) -> Tensor:
        """`E` `[D, d]`."""
        return orthonormal(self.basis) if self.is_learned else self.basis

    def forward(self, frame: Tensor) -> Tensor:
        """`[..., V, D]` of `[..., V, d]`."""
        with without_autocast(frame.device.type):
            lifted = frame @ self.matrix().T
        return canonical(lifted) if self.is_canonical else lifted

    def extra_repr(self) -> str:
        return f"{self.sizes[1]} -> {self.sizes[0]}, {'learned' if self.is_learned else 'fixed'}"


def seeded_lens(lens_dim: int, base_dim: int, seed: int) -> Tensor:
    """`[D, d]` float32: the orthonormal factor of a float64 Gaussian matrix drawn by `seed`.

    On the CPU wherever modules are being made, so that a model made on the meta device has it too.
    """
    generator = torch.Generator("cpu").manual_seed(seed)
    size = (lens_dim, base_dim)
    drawn = torch.randn(*size, generator=generator, dtype=torch.float64, device="cpu")
    return orthonormal(drawn).float()


def orthonormal(matrix: Tensor) -> Tensor:
    """The `Q` `[D, d]` of `matrix = Q R` with a positive diagonal of `R`, which makes it unique."""
    q, r = torch.linalg.qr(matrix)
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)


def check_isometry(lens: Lens) -> None:
    """Refuse weights that are no lens, before a frame goes through them.

    What half precision makes of one passes.

    Raises:
        ValueError: `max |E^T E - 1|` is above 0.01.
    """
    if lens.basis.is_meta:
        return
    error = lens_error(lens.matrix())
    # So that nan is refused, too.
    if not error <= _LARGEST_ERROR:
        raise ValueError(
            f"lens.basis: expected E with |E^T E - 1| <= {_LARGEST_ERROR}, an isometry, got "
            f"{error:.3g}. What a learned lens stores is none by itself: keep its lens_mode"
        )


def lens_error(basis: Tensor) -> float:
    """`max |E^T E - 1|` of `E` `[D, d]`, computed in float64: 0 for an isometry."""
    matrix = basis.detach().double().cpu()
    gram = matrix.T @ matrix
    return float((gram - torch.eye(gram.shape[0], dtype=gram.dtype)).abs().max())
