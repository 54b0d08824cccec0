"""What a few bits keep of a vector, and what the turn before them is worth."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gravity_hf.ops.code_packing import BITS, pack, packed_bytes, unpack
from gravity_hf.ops.published_codec import PublishedCodec
from gravity_hf.ops.rotated_codec import _NUMBERS_AT_ONCE, Packed, RotatedCodec, rotation


def keys(width: int = 64, outliers: int = 0) -> Tensor:
    vectors = torch.randn(2, 2, 150, width, generator=torch.Generator().manual_seed(1))
    vectors[..., :outliers] *= 30
    return vectors


def error(codec: RotatedCodec, vectors: Tensor) -> float:
    """Of what is read, beside the size of the vectors."""
    read = codec.dequantize(codec.quantize(vectors))
    return float((read - vectors).norm() / vectors.norm())


@pytest.mark.parametrize("width", [1, 8, 48, 64, 80, 128])
def test_the_turn_keeps_every_distance(width):
    matrix = rotation(width, seed=3).double()
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(width).double(), rtol=0, atol=2e-6)
    assert width < 2 or not torch.equal(matrix.float(), rotation(width, seed=4))


@pytest.mark.parametrize("width", [64, 80])
def test_the_turn_spreads_what_one_coordinate_holds(width):
    spike = torch.zeros(width)
    spike[3] = 1.0
    assert (spike @ rotation(width, 0)).abs().max() < 0.5


@pytest.mark.parametrize("width", [1, 2, 7, 64])
@pytest.mark.parametrize("bits", BITS)
def test_packed_codes_come_out_as_they_went_in(bits, width):
    codes = torch.randint(0, 2**bits, (3, 5, width), dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (3, 5, packed_bytes(width, bits)) == (3, 5, -(-width * bits // 8))
    assert torch.equal(unpack(packed, bits, width), codes)


@pytest.mark.parametrize("ranges, tail", [("byte", 2), ("half", 4)])
def test_a_vector_takes_the_bytes_that_the_codec_says(ranges, tail):
    codec = RotatedCodec(width=128, bits=4, group=64, ranges=ranges)
    packed = codec.quantize(keys(128))
    taken = sum(x.untyped_storage().nbytes() for x in packed) / (2 * 2 * 150)
    assert taken == codec.bytes_per_vector == 64 + 2 * tail


@pytest.mark.parametrize("bits, most", [(2, 0.36), (4, 0.095), (8, 0.006)])
@pytest.mark.parametrize("width, group", [(64, 64), (64, 32), (80, 64), (7, 64)])
def test_the_error_is_that_of_the_grid(width, group, bits, most):
    codec = RotatedCodec(width, bits, group)
    assert width % codec.group_width == 0 and codec.group_width <= group
    assert error(codec, keys(width)) < most


@pytest.mark.parametrize("bits", BITS)
def test_ranges_in_a_byte_cost_next_to_nothing(bits):
    in_byte, in_half = (
        error(RotatedCodec(64, bits, ranges=ranges), keys()) for ranges in ("byte", "half")
    )
    assert in_byte < (1.03 if bits < 8 else 1.1) * in_half


@pytest.mark.parametrize("bits", BITS)
def test_turning_pays_where_a_few_coordinates_are_large(bits):
    vectors = keys(outliers=2)
    assert error(RotatedCodec(64, bits), vectors) < 0.6 * error(
        RotatedCodec(64, bits, rotated=False), vectors
    )


@pytest.mark.parametrize("value", [0.0, 1e-3, -700.0])
def test_vectors_of_one_value_are_read_as_they_were(value):
    codec = RotatedCodec(64, bits=4, rotated=False)
    vectors = torch.full((1, 1, 2, 64), value)
    read = codec.dequantize(codec.quantize(vectors))
    torch.testing.assert_close(read, vectors, rtol=0.05, atol=0)


def test_what_is_coded_depends_on_no_other_vector():
    codec, vectors = RotatedCodec(64, rotated=False), keys()
    alone = codec.quantize(vectors[1:, :, 7:8])
    vectors[0] *= 1000
    vectors[1, :, 8:] = 0
    together = codec.quantize(vectors)
    assert torch.equal(together.codes[1:, :, 7:8], alone.codes)
    assert torch.equal(together.ranges[1:, :, 7:8], alone.ranges)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_are_the_whole(dtype, monkeypatch):
    codec = RotatedCodec(64)
    at_once = codec.quantize(keys())
    monkeypatch.setitem(_NUMBERS_AT_ONCE, "cpu", 2 * 2 * 64 * 40)
    packed = codec.quantize(keys())
    assert [x.shape for x in packed] == [x.shape for x in at_once]
    torch.testing.assert_close(codec.dequantize(packed), codec.dequantize(at_once))
    out = torch.full((2, 2, 160, 64), 7.0, dtype=dtype)
    codec.dequantize_into(packed, out[:, :, :150])
    torch.testing.assert_close(out[:, :, :150], codec.dequantize(packed, dtype))
    assert (out[:, :, 150:] == 7.0).all()


def test_autocast_rounds_nothing_more():
    codec = RotatedCodec(64, bits=8)
    with torch.autocast("cpu", torch.bfloat16):
        packed = codec.quantize(keys())
        read = codec.dequantize(packed)
    expected = codec.quantize(keys())
    assert torch.equal(packed.codes, expected.codes)
    assert torch.equal(read, codec.dequantize(expected))


@pytest.mark.parametrize(
    "wrong", [{"bits": 3}, {"group": 0}, {"width": 0}, {"ranges": "float"}], ids=str
)
def test_settings_that_mean_nothing_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=rf"RotatedCodec\.{name}: expected"):
        RotatedCodec(**{"width": 64, **wrong})


def test_vectors_of_another_width_are_refused():
    with pytest.raises(ValueError, match="expected vectors 64 wide"):
        RotatedCodec(64).quantize(torch.zeros(3, 32))


def test_the_published_codec_shares_a_range_among_all_tokens():
    codec, vectors = PublishedCodec(), keys()
    read = codec.dequantize(codec.quantize(vectors), heads=2, dtype=torch.float32)
    assert (read - vectors).norm() < 0.2 * vectors.norm()
    vectors[0, :, 0] *= 100
    read = codec.dequantize(codec.quantize(vectors), heads=2, dtype=torch.float32)
    # One large token takes the grid away from the others; ours does not notice.
    others = (slice(None), slice(None), slice(1, None))
    assert (read - vectors)[others].norm() > 0.5 * vectors[others].norm()
    ours = RotatedCodec(64)
    read = ours.dequantize(ours.quantize(vectors))
    assert (read - vectors)[others].norm() < 0.1 * vectors[others].norm()


def test_changing_codes_changes_both_parts():
    packed = RotatedCodec(64).quantize(keys()).changed(lambda x: x[:1])
    assert isinstance(packed, Packed) and [len(x) for x in packed] == [1, 1]
