"""Codes of frames: as many bytes as promised, rows on the sphere, and near to what they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor
from torch.nn.functional import normalize

from gravity_hf.models.geolip.bits import pack_bits, packed_bytes, unpack_bits
from gravity_hf.models.geolip.codes import (
    BITS,
    FrameCodes,
    dequantize_frames,
    load_codes,
    quantize_frames,
    save_codes,
)


def frames(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(*shape, generator=generator), dim=-1)


@pytest.mark.parametrize("dim", [2, 3, 4, 7, 16])
@pytest.mark.parametrize("bits", BITS)
def test_codes_take_the_bits_they_are_said_to(dim: int, bits: int) -> None:
    """Counted by the storage: each token's degrees of freedom in whole bytes."""
    codes = quantize_frames(frames(3, 5, 6, dim), bits)
    each = -(-6 * (dim - 1) * bits // 8)
    assert codes.packed.untyped_storage().nbytes() == codes.nbytes == 15 * each
    assert codes.bytes_per_token == each and codes.tokens == 15


@pytest.mark.parametrize("dim", [2, 3, 4, 7, 16])
@pytest.mark.parametrize("bits", BITS)
def test_what_comes_back_lies_on_the_sphere_and_in_its_own_cell(dim: int, bits: int) -> None:
    frame = frames(7, 9, dim)
    codes = quantize_frames(frame, bits)
    back = dequantize_frames(codes)
    assert back.shape == frame.shape and back.dtype == torch.float32
    assert (back.norm(dim=-1) - 1).abs().max() < 1e-6
    assert torch.equal(quantize_frames(back, bits).packed, codes.packed)


def test_distortion_is_within_seven_percent_of_equal_cubes() -> None:
    """`(d - 1) / 12` squared edges of cubes that divide the sphere's surface, 2 pi^2, evenly. Steps
    of angles take 1.7 times that."""
    frame = frames(20000, 1, 4)
    for bits in (4, 6, 8):
        back = dequantize_frames(quantize_frames(frame, bits))
        found = (back - frame).square().sum(-1).mean()
        bound = 3 / 12 * (2 * torch.pi**2 / 2 ** (3 * bits)) ** (2 / 3)
        assert bound * 0.95 < found < bound * 1.07


def test_axes_and_ties_come_back_near() -> None:
    """Rows on an edge of the cube, with zeros, and with equal coordinates of both signs."""
    rows = torch.cat([torch.eye(4), -torch.eye(4), normalize(torch.ones(1, 4), dim=-1)])
    rows = torch.cat([rows, rows[-1:] * torch.tensor([1.0, -1.0, 1.0, -1.0])])
    back = dequantize_frames(quantize_frames(rows, 8))
    assert (back - rows).norm(dim=-1).max() < 0.02


def test_half_precision_and_slices_are_written_as_the_same_values_elsewhere() -> None:
    wide = frames(4, 6, 4)
    part = wide[1:3, ::2].bfloat16()
    codes = quantize_frames(part, 5)
    assert torch.equal(codes.packed, quantize_frames(part.float().clone(), 5).packed)
    assert codes.nbytes == 2 * packed_bytes([15] * 3)


def test_codes_come_back_from_a_file(tmp_path: Path) -> None:
    codes = quantize_frames(frames(2, 3, 8, 4), 3)
    read = load_codes(save_codes(codes, tmp_path / "room" / "codes.safetensors"))
    assert torch.equal(dequantize_frames(read), dequantize_frames(codes))
    assert [path.name for path in (tmp_path / "room").iterdir()] == ["codes.safetensors"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    safetensors.torch.save_file({"packed": torch.zeros(2, 3)}, other)
    (tmp_path / "text").write_text("no tensors")
    codes = quantize_frames(frames(2, 8, 4), 3)
    said = {"format": "gravity_hf.frame_codes.1", "num_rows": "9", "dim": "4", "bits": "3"}
    contradictory = tmp_path / "contradictory"
    safetensors.torch.save_file({"packed": codes.packed}, contradictory, metadata=said)
    for file in (other, tmp_path / "text", tmp_path / "none", contradictory):
        with pytest.raises(ValueError, match="expected a file of save_codes"):
            load_codes(file)


@pytest.mark.parametrize(
    ("frame", "bits", "message"),
    [
        (frames(2, 4), 1, "bits: expected 2 to 8 for each degree, got 1"),
        (frames(2, 4), 9, "got 9"),
        (frames(2, 4) * 2, 4, "expected rows of unit length"),
        (frames(2, 4) * torch.nan, 4, "expected rows of unit length"),
        (torch.ones(2, 1), 4, "dimension 2 or more, got 1"),
        (torch.ones(2, 4).int(), 4, "expected floats"),
    ],
)
def test_what_has_no_codes_is_refused(frame: Tensor, bits: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_frames(frame, bits)


def test_codes_of_another_size_are_refused() -> None:
    packed = quantize_frames(frames(2, 8, 4), 3).packed
    with pytest.raises(ValueError, match=r"expected uint8 \[..., 12\] for 8 rows"):
        FrameCodes(packed, num_rows=8, dim=4, bits=4)


@pytest.mark.parametrize("widths", [[1], [3, 0, 5, 8, 1], [13, 24, 2], [8] * 5])
def test_packed_values_come_back(widths: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    columns = [torch.randint(1 << w, (4, 50), generator=generator) for w in widths]
    values = torch.stack(columns, -1)
    packed = pack_bits(values, widths)
    assert packed.shape == (4, 50, packed_bytes(widths)) == (4, 50, -(-sum(widths) // 8))
    assert torch.equal(unpack_bits(packed, widths).long(), values)


def test_values_that_do_not_fit_are_not_cut() -> None:
    with pytest.raises(ValueError, match=r"expected values in \[0, 2\^width\)"):
        pack_bits(torch.tensor([[1, 4]]), [2, 2])
    with pytest.raises(ValueError, match="expected integers of 0 to 24 bits"):
        pack_bits(torch.tensor([[1]]), [25])
