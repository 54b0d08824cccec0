"""Codes of rows: what they take, what they lose, and that nothing else is lost."""

from __future__ import annotations

import math

import pytest
import torch

from gravity_hf.knowledge.delta_codec import CODEBOOKS, WIDTHS, FactorCodec, gaussian_levels

# Mean squared error of the best 2^bits levels for a standard Gaussian (Max, 1960, table I).
PUBLISHED = {2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}


def gaussian(rows, width, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


def relative(codec, rows):
    error = codec.decode(codec.encode(rows), rows.shape[1]) - rows
    return float(error.norm() / rows.norm())


@pytest.mark.parametrize("bits", PUBLISHED)
def test_gaussian_levels_are_the_published_ones(bits):
    levels = gaussian_levels(bits).double()
    x = torch.linspace(-8, 8, 200_001, dtype=torch.float64)
    density = (-x.square() / 2).exp() / math.sqrt(2 * math.pi)
    nearest = levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]
    error = float(((x - nearest).square() * density).sum() * (x[1] - x[0]))
    assert error == pytest.approx(PUBLISHED[bits], rel=3e-3)


@pytest.mark.parametrize("codebook", CODEBOOKS)
@pytest.mark.parametrize("bits", WIDTHS)
def test_each_bit_about_halves_the_error(bits, codebook):
    rows = gaussian(4, 1024)
    error = relative(FactorCodec(bits, codebook), rows)
    # Within a quarter of what the best levels give a Gaussian: 1.65 * 2^-bits for many levels.
    expected = math.sqrt(PUBLISHED[bits]) if bits in PUBLISHED else 1.6 * 2.0**-bits
    assert 0.7 * expected < error < 1.3 * expected


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("width", [32, 33, 96, 576])
def test_codes_take_the_bytes_that_they_say(bits, width):
    codec = FactorCodec(bits, group=32)
    coded = codec.encode(gaussian(3, width))
    padded = -(-width // 32) * 32
    assert coded.codes.shape == (3, padded * bits // 8) == (3, codec.bytes_per_row(width))
    assert coded.scales.shape == (3, padded // 32) and coded.scales.dtype == torch.uint8
    assert codec.decode(coded, width).shape == (3, width)


@pytest.mark.parametrize("bits", WIDTHS)
def test_every_code_is_read_as_it_was_written(bits):
    codec = FactorCodec(bits)
    codes = torch.arange(512).remainder(2**bits).to(torch.uint8)[None]
    assert torch.equal(codec._unpacked(codec._packed(codes), 512), codes)


def test_rows_of_any_size_keep_their_share_of_precision():
    """Large and small rows do not share a scale."""
    rows = gaussian(3, 256) * torch.tensor([[1e-12], [1.0], [1e12]])
    codec = FactorCodec(4)
    error = codec.decode(codec.encode(rows), 256) - rows
    assert (error.norm(dim=1) / rows.norm(dim=1)).max() < 0.12


def test_turning_spreads_a_coordinate_that_sticks_out():
    """Of one coordinate a thousand times the others, the others would be lost without the turn."""
    rows = gaussian(1, 256)
    rows[0, 7] = 1000.0
    assert relative(FactorCodec(4), rows) < 0.12


def test_zeros_stay_zeros():
    rows = torch.zeros(2, 64)
    assert not FactorCodec(3).decode(FactorCodec(3).encode(rows), 64).any()


def test_the_seed_turns_and_repeats():
    rows = gaussian(2, 128)
    first, again = (FactorCodec(3, seed=1).encode(rows) for _ in range(2))
    other = FactorCodec(3, seed=2).encode(rows)
    assert torch.equal(first.codes, again.codes)
    assert not torch.equal(first.codes, other.codes)


@pytest.mark.parametrize(
    "bad", [{"bits": 1}, {"bits": 4, "codebook": "x"}, {"bits": 4, "group": 5}]
)
def test_unknown_settings_are_refused(bad):
    with pytest.raises(ValueError, match="expected one of"):
        FactorCodec(**bad)
