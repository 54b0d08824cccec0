"""Frames as bits: rows on a sphere, quantised, packed, counted, and back on the sphere.

A row of `S^(d-1)` is seen on the cube around the sphere: the face is its largest coordinate with
its sign, and the other d - 1 coordinates, divided by the largest one, lie in [-1, 1]. They are bent
by `t = 4 atan(x) / pi`, so that steps of `t` are equal steps along great circles through the middle
of the face, and cut into equal steps. The mean squared distance between a uniformly distributed row
of S^3 and what comes back, at 3, 4, 6 and 8 bits for each of its three degrees of freedom:

                                       3        4        6        8
    this                               0.0299   0.00753  0.000473 0.0000296
    uniform steps of three angles      0.0476   0.0120   0.000755 0.0000471
    a grid in R^4, rows normalised     0.0625   0.0156   0.00207  0.000244
    2^(3b) random directions           0.0385   0.00988  -        -
    the same, moved by Lloyd's rule    0.0282   0.00738  -        -
    cubes of equal size, a bound       0.0285   0.00713  0.000446 0.0000279

A table of directions is hardly better where it can be searched at all. In dimensions whose cubes
have no power of two of faces, part of a bit is lost: at d = 3 and 4 bits 0.0140, of angles 0.0117.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor
from torch.nn.functional import normalize

from .bits import pack_bits, packed_bytes, unpack_bits

BITS = range(2, 9)
_FORMAT = "gravity_hf.frame_codes.1"
# What bfloat16 makes of unit rows, and some.
_UNIT = 0.02


@dataclass(frozen=True)
class FrameCodes:
    """Quantised frames: `packed` uint8 `[..., bytes of a token]`, of `num_rows` rows in `R^dim`,
    with `bits` for each of the `dim - 1` degrees of freedom of a row."""

    packed: Tensor
    num_rows: int
    dim: int
    bits: int

    def __post_init__(self) -> None:
        expected = packed_bytes(_widths(self.dim, self.bits) * _rows(self.num_rows))
        packed = self.packed
        if packed.dtype != torch.uint8 or packed.dim() < 1 or packed.shape[-1] != expected:
            raise ValueError(
                f"FrameCodes.packed: expected uint8 [..., {expected}] for {self.num_rows} rows of "
                f"dimension {self.dim} at {self.bits} bits, got {packed.dtype} "
                f"{list(packed.shape)}"
            )

    @property
    def tokens(self) -> int:
        """How many frames there are."""
        return math.prod(self.packed.shape[:-1])

    @property
    def nbytes(self) -> int:
        """Bytes of the storage behind `packed`, all of it."""
        return self.packed.untyped_storage().nbytes()

    @property
    def bytes_per_token(self) -> float:
        return self.nbytes / self.tokens


def quantize_frames(frame: Tensor, bits: int) -> FrameCodes:
    """Write frames with `bits` for each degree of freedom; each token fills whole bytes.

    Args:
        frame: `[..., V, d]`, unit rows, as `GeolipModel.encode` gives them; d >= 2.
        bits: 2 to 8. A row takes `bits (d - 1)` in all, its face included.

    Raises:
        ValueError: another number of bits, or rows that are not of unit length.
    """
    if not frame.is_floating_point() or frame.dim() < 2:
        raise ValueError(
            f"quantize_frames: expected floats [..., V, d], got {frame.dtype} {list(frame.shape)}"
        )
    rows, dim = frame.shape[-2:]
    widths = _widths(dim, bits) * _rows(rows)
    values = frame.detach().float()
    off = (values.norm(dim=-1) - 1).abs()
    if not bool((off <= _UNIT).all()):
        raise ValueError(
            "quantize_frames: expected rows of unit length, got some that are not. Give what "
            "GeolipModel.encode returns, or normalise the rows first"
        )
    fields = _to_fields(values, _widths(dim, bits)[1:])
    return FrameCodes(pack_bits(fields.flatten(-2), widths), rows, dim, bits)


def dequantize_frames(codes: FrameCodes) -> Tensor:
    """The frames, float32 `[..., V, d]`: in the middle of each cell, rows of unit length."""
    row = _widths(codes.dim, codes.bits)
    fields = unpack_bits(codes.packed, row * codes.num_rows)
    return _from_fields(fields.unflatten(-1, (codes.num_rows, codes.dim)), row[1:])


def save_codes(codes: FrameCodes, file: str | os.PathLike[str]) -> Path:
    """Write a safetensors file, whole or not at all."""
    path = Path(file)
    path.parent.mkdir(parents=True, exist_ok=True)
    said = {"num_rows": codes.num_rows, "dim": codes.dim, "bits": codes.bits}
    metadata = {"format": _FORMAT, **{name: str(value) for name, value in said.items()}}
    unfinished = path.with_name(f".{path.name}.tmp")
    tensors = {"packed": codes.packed.cpu().contiguous()}
    safetensors.torch.save_file(tensors, unfinished, metadata=metadata)
    unfinished.replace(path)
    return path


def load_codes(file: str | os.PathLike[str]) -> FrameCodes:
    """What `save_codes` wrote.

    Raises:
        ValueError: no such file, or another one.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"{path}: expected a file of save_codes, got none there. Check the path")
    try:
        with safetensors.safe_open(path, "pt") as opened:
            said = opened.metadata() or {}
            if said.get("format") != _FORMAT:
                raise ValueError(f"format {said.get('format')!r}, not {_FORMAT!r}")
            numbers = [int(said[name]) for name in ("num_rows", "dim", "bits")]
            return FrameCodes(opened.get_tensor("packed"), *numbers)
    except (ValueError, KeyError, OSError, safetensors.SafetensorError) as error:
        raise ValueError(
            f"{path}: expected a file of save_codes, got another: {error}. Quantise the frames anew"
        ) from error


def _rows(count: int) -> int:
    if not isinstance(count, int) or count < 1:
        raise ValueError(f"frames: expected at least 1 row, got {count!r}")
    return count


def _widths(dim: int, bits: int) -> list[int]:
    """Bits of a row's fields: of its face, then of d - 1 coordinates, `bits (d - 1)` in all."""
    if not isinstance(bits, int) or bits not in BITS:
        raise ValueError(f"bits: expected {BITS[0]} to {BITS[-1]} for each degree, got {bits!r}")
    if not isinstance(dim, int) or dim < 2:
        raise ValueError(f"frames: expected rows of dimension 2 or more, got {dim!r}")
    face = math.ceil(math.log2(2 * dim))
    each, more = divmod(bits * (dim - 1) - face, dim - 1)
    return [face] + [each + (index < more) for index in range(dim - 1)]


def _steps(widths: list[int], device: torch.device) -> Tensor:
    return torch.tensor([1 << width for width in widths], dtype=torch.float32, device=device)


def _others(dim: int, device: torch.device) -> Tensor:
    """`[d, d - 1]`: the coordinates that are not the one of the row."""
    index = torch.arange(dim - 1, device=device)
    return index + (index >= torch.arange(dim, device=device)[:, None])


def _to_fields(frame: Tensor, widths: list[int]) -> Tensor:
    """`[..., d]`: the face, `2 axis + (sign < 0)`, then the steps."""
    axis = frame.abs().argmax(-1, keepdim=True)
    largest = frame.gather(-1, axis)
    rest = frame.gather(-1, _others(frame.shape[-1], frame.device)[axis.squeeze(-1)])
    bent = torch.atan(rest / largest.abs()) * (4 / math.pi)
    steps = _steps(widths, frame.device)
    cells = ((bent + 1) / 2 * steps).floor().clamp(min=0).minimum(steps - 1)
    return torch.cat([2 * axis + (largest < 0), cells.long()], -1)


def _from_fields(fields: Tensor, widths: list[int]) -> Tensor:
    dim = fields.shape[-1]
    # A damaged file may name faces that a cube has not.
    face = fields[..., :1].long().clamp(max=2 * dim - 1)
    axis, negative = face // 2, face % 2
    bent = (fields[..., 1:] + 0.5) / _steps(widths, fields.device) * 2 - 1
    rest = torch.tan(bent * (math.pi / 4))
    frame = torch.empty(fields.shape, dtype=torch.float32, device=fields.device)
    frame.scatter_(-1, axis, (1 - 2 * negative).float())
    frame.scatter_(-1, _others(dim, fields.device)[axis.squeeze(-1)], rest)
    return normalize(frame, dim=-1)


__all__ = [
    "BITS",
    "FrameCodes",
    "dequantize_frames",
    "load_codes",
    "quantize_frames",
    "save_codes",
]
