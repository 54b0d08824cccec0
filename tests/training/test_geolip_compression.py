"""Codes that are compared are counted and measured alike, and each peer is as good as it can be."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from gravity_hf.models.geolip import GeolipConfig, GeolipForReconstruction
from gravity_hf.training.geolip.compression import (
    LinearCodes,
    autoencoder_points,
    geolip_points,
)
from gravity_hf.training.geolip.fitting import fit
from gravity_hf.training.geolip.plain_autoencoder import PlainAutoencoder
from gravity_hf.training.geolip.scalar_codes import allocate_bits, measure_distortions

WIDTH = 10
# Variances fall by directions, dimensions have means and scales of their own.
SCALES = 2.0 ** -torch.arange(WIDTH)


def tokens(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9)))
    drawn = torch.randn(count, WIDTH, generator=generator) * SCALES
    return drawn @ mixing[0] * torch.linspace(1, 3, WIDTH) + torch.arange(WIDTH)


TRAINING, HELD_OUT = tokens(4000, 0), tokens(1000, 1)
MEAN, STD = TRAINING.mean(0), TRAINING.std(0)


@pytest.fixture(scope="module")
def linear() -> LinearCodes:
    return LinearCodes(TRAINING)


def test_linear_codes_take_at_most_the_bytes_they_may(linear: LinearCodes) -> None:
    points = linear.points(HELD_OUT, (1, 2, 4, 8))
    for method in ("PCA", "PCA, bits by variance"):
        sizes = [x.bytes_per_token for x in points if x.method == method]
        assert sizes == [1, 2, 4, 8]
    features = {x.bits: x.bytes_per_token for x in points if x.method == "features"}
    assert features == {8: WIDTH, 4: WIDTH / 2}


def test_more_bytes_keep_more_and_bits_by_variance_are_never_worse(linear: LinearCodes) -> None:
    """All ten coefficients in 8 bits are as good as none left out."""
    points = linear.points(HELD_OUT, (1, 2, 4, 8, 10))
    plain = [x.relative_error for x in points if x.method == "PCA"]
    dealt = [x.relative_error for x in points if x.method == "PCA, bits by variance"]
    assert plain == sorted(plain, reverse=True) and dealt == sorted(dealt, reverse=True)
    assert all(b <= a + 0.003 for a, b in zip(plain, dealt, strict=True)) and dealt[2] < plain[2]
    assert plain[-1] < 0.002


def test_linear_codes_are_measured_as_defined(linear: LinearCodes) -> None:
    """8 bits of everything: what comes back, computed by hand from the statistics."""
    (point,) = [x for x in linear.points(HELD_OUT, ()) if x.bits == 8]
    quantiser = linear._of_features.codes([8] * WIDTH)
    wanted = (HELD_OUT - MEAN) / TRAINING.std(0, correction=0)
    found = quantiser.decode(quantiser.encode(wanted))
    assert point.cosine == pytest.approx(cosine_similarity(wanted, found).mean().item(), abs=1e-6)
    error = (found - wanted).square().sum() / wanted.square().sum()
    assert point.relative_error == pytest.approx(error.item(), rel=1e-3)


def test_ends_of_steps_are_near_the_best_of_a_normal_distribution() -> None:
    """Errors of the best uniform quantisers of N(0, 1), by J. Max (1960), tables: 1 to 4 bits."""
    values = torch.randn(8000, 2, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 9])
    error = measure_distortions(values).error / values.var(0)
    for bits, best in ((0, 1.0), (1, 0.3634), (2, 0.1188), (3, 0.03744), (4, 0.01154)):
        assert error[bits].tolist() == pytest.approx([best, best], rel=0.06)


def test_bits_go_where_they_help_most() -> None:
    """Nobody saves more by moving a bit from one column to another."""
    error = measure_distortions((TRAINING - MEAN) * SCALES).error
    bits = allocate_bits(error, 20)
    assert bits.sum() == 20
    columns = torch.arange(WIDTH)
    gained = (error[bits, columns] - error[bits + 1, columns]).max()
    held = bits > 0
    lost = (error[bits - 1, columns] - error[bits, columns])[held].min()
    assert gained <= lost


def rows(features: Tensor) -> list[dict[str, Tensor]]:
    """Windows of several lengths."""
    return [{"patches": part} for part in features.split([7, 2, 5, len(features) - 14])]


@pytest.fixture(scope="module")
def geolip() -> GeolipForReconstruction:
    torch.manual_seed(0)
    config = GeolipConfig(patch_dim=WIDTH, num_rows=6, lens_dim=8, hidden_size=16)
    model = GeolipForReconstruction(config)
    model.set_feature_statistics(MEAN, STD)
    windows = [{"patches": part} for part in TRAINING.split(40)]
    fit(model, windows, steps=120, batch_size=8, lr=4e-3)
    return model


def test_frames_are_counted_without_padding_and_decoded_from_their_codes(
    geolip: GeolipForReconstruction,
) -> None:
    points = {x.bits: x for x in geolip_points(geolip, rows(HELD_OUT[:40]), (3, 8), batch_size=4)}
    assert points[3].bytes_per_token == -(-6 * 3 * 3 // 8) and points[8].bytes_per_token == 18
    assert points[None].bytes_per_token == 6 * 4 * 4
    assert points[3].cosine < points[8].cosine == pytest.approx(points[None].cosine, abs=2e-3)
    model = geolip.eval()
    with torch.no_grad():
        found = [model(row["patches"][None]).reconstruction[0] for row in rows(HELD_OUT[:40])]
    wanted, found = (model.normalize_features(x) for x in (HELD_OUT[:40], torch.cat(found)))
    exact = cosine_similarity(wanted, found).mean().item()
    assert points[None].cosine == pytest.approx(exact, abs=1e-5)


def test_readers_weights_are_counted_and_writers_are_not(geolip: GeolipForReconstruction) -> None:
    (point,) = geolip_points(geolip, rows(HELD_OUT[:40]), ())
    parts = (geolip.decoder, geolip.spectral, geolip.lens)
    weights = sum(x.numel() for part in parts for x in part.state_dict().values())
    assert point.side_bytes == 4 * (weights + 2 * WIDTH)


def test_measuring_leaves_the_model_as_it_was(geolip: GeolipForReconstruction) -> None:
    geolip.train()
    before = {key: x.clone() for key, x in geolip.state_dict().items()}
    geolip_points(geolip, rows(HELD_OUT[:40]), (3,))
    assert geolip.training
    assert all(torch.equal(before[key], x) for key, x in geolip.state_dict().items())


def test_autoencoder_learns_and_its_codes_are_quantised() -> None:
    torch.manual_seed(0)
    model = PlainAutoencoder(WIDTH, 18, 16, mean=MEAN, std=STD)
    windows = [{"patches": part} for part in TRAINING.split(40)]
    losses = fit(model, windows, steps=120, batch_size=8, lr=4e-3)
    assert losses[-1] < 0.4 * losses[0]
    points = {x.bits: x for x in autoencoder_points(model, TRAINING, HELD_OUT, (2, 8))}
    assert points[2].bytes_per_token == -(-18 * 2 // 8) and points[8].bytes_per_token == 18
    assert points[2].cosine < points[8].cosine == pytest.approx(points[None].cosine, abs=5e-3)
    assert points[None].cosine > 0.8


def test_padding_teaches_the_autoencoder_nothing() -> None:
    torch.manual_seed(0)
    model = PlainAutoencoder(WIDTH, 4, 8, mean=MEAN, std=STD)
    patches, mask = HELD_OUT[:6].view(2, 3, WIDTH).clone(), torch.tensor([[1, 1, 1], [1, 0, 0]])
    loss = model(patches, mask).loss
    patches[1, 1:] = 1e3
    assert torch.equal(model(patches, mask).loss, loss)
