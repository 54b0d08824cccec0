"""The networks on either side of a frame: patches to rows on the sphere, and back."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_layers import GradientCheckpointingLayer

from ...layers.float32 import without_autocast
from ...ops.reference import compute_dtype
from .configuration_geolip import GeolipConfig
from .frames import canonical

_LEAST_LENGTH = 1e-12


class ResidualBlock(GradientCheckpointingLayer):
    """`h + fc2(GELU(fc1(norm(h))))`; without `norm` where the config has no block_norm."""

    def __init__(self, width: int, *, norm: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.fc1 = nn.Linear(width, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden + self.fc2(F.gelu(self.fc1(self.norm(hidden))))


class RowOutput(nn.Linear):
    """The map that frames are made of. It starts orthogonal, so that rows start spread out."""


class ResidualNetwork(nn.Module):
    """`proj_out(blocks(GELU(proj_in(x))))`, token by token.

    State: `proj_in.*`, `blocks.{i}.{norm, fc1, fc2}.*`, `proj_out.*`.
    """

    output_map: type[nn.Linear] = nn.Linear

    def __init__(self, inputs: int, width: int, outputs: int, depth: int, *, norm: bool) -> None:
        super().__init__()
        self.proj_in = nn.Linear(inputs, width)
        self.blocks = nn.ModuleList(ResidualBlock(width, norm=norm) for _ in range(depth))
        self.proj_out = self.output_map(width, outputs)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.gelu(self.proj_in(_in_dtype_of(self.proj_in, x)))
        for block in self.blocks:
            hidden = block(hidden)
        return self.proj_out(hidden)


class FrameEncoder(ResidualNetwork):
    """Patches `[..., P]` to frames `[..., V, d]`, at least float32."""

    output_map = RowOutput

    def __init__(self, config: GeolipConfig, patch_dim: int) -> None:
        outputs = config.num_rows * config.base_dim
        super().__init__(
            patch_dim, config.hidden_size, outputs, config.encoder_depth, norm=config.block_norm
        )
        self.base_dim, self.is_canonical = config.base_dim, config.frame_sign != "signed"

    def forward(self, x: Tensor) -> Tensor:
        rows = super().forward(x)
        rows = rows.to(compute_dtype(rows.dtype)).unflatten(-1, (-1, self.base_dim))
        with without_autocast(rows.device.type):
            frame = F.normalize(rows, dim=-1, eps=_LEAST_LENGTH)
        return canonical(frame) if self.is_canonical else frame


class FrameDecoder(ResidualNetwork):
    """Frames `[..., V, w]`, their columns scaled by spectra `[..., w]`, to patches `[..., P]`."""

    def __init__(self, config: GeolipConfig, columns: int, patch_dim: int, width: int) -> None:
        inputs, depth = config.num_rows * columns, config.decoder_depth
        own = config.decoder_block_norm
        norm = config.block_norm if own is None else own
        super().__init__(inputs, width, patch_dim, depth, norm=norm)

    def forward(self, frame: Tensor, scale: Tensor | None = None) -> Tensor:
        scaled = frame if scale is None else frame * scale.unsqueeze(-2)
        return super().forward(scaled.flatten(-2))


class ZeroConvolution(nn.Conv2d):
    """A convolution that starts as 0."""


class BoundarySmooth(nn.Module):
    """`x + conv2(GELU(conv1(x)))` of images `[B, C, H, W]`; it starts as `x`."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, inner, 3, padding=1)
        self.conv2 = ZeroConvolution(inner, channels, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        return images + self.conv2(F.gelu(self.conv1(_in_dtype_of(self.conv1, images))))


def _in_dtype_of(module: nn.Linear | nn.Conv2d, x: Tensor) -> Tensor:
    """As its weights are, unless those are packed, as quantised ones are."""
    dtype = module.weight.dtype
    return x.to(dtype) if dtype.is_floating_point and dtype.itemsize > 1 else x
