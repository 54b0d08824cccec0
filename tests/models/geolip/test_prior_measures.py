"""Measures of generated images: 0 for the same set, known for known differences."""

from __future__ import annotations

import pytest
import torch

from gravity_hf.models.geolip.prior_measures import (
    compare_images,
    log_power_spectrum,
    nearest_distances,
    share_below,
    sliced_wasserstein,
)


@pytest.fixture(scope="module")
def images() -> torch.Tensor:
    return torch.randn(120, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def test_a_set_is_no_distance_from_itself_in_another_order() -> None:
    points = torch.randn(50, 6)
    assert sliced_wasserstein(points, points.flip(0)) < 1e-12


def test_a_shift_is_as_far_as_its_length_along_each_direction() -> None:
    points = torch.randn(50, 1)
    assert sliced_wasserstein(points, points + 0.7) == pytest.approx(0.7, abs=1e-6)


def test_only_sets_of_one_size_are_compared() -> None:
    with pytest.raises(ValueError, match="as many points of both"):
        sliced_wasserstein(torch.zeros(3, 2), torch.zeros(4, 2))


def test_a_wave_has_its_power_at_its_frequency() -> None:
    wave = torch.cos(2 * torch.pi * 3 * torch.arange(16) / 16).expand(1, 1, 16, 16)
    spectrum = log_power_spectrum(wave)[0]
    # A wave of height 1 has a mean square of 1/2; half of the spectrum shows half of its power.
    assert spectrum.argmax() == 3 and spectrum[0, 3].exp() == pytest.approx(16 * 16 / 4, rel=1e-3)


def test_nearest_distance_is_per_pixel(images: torch.Tensor) -> None:
    moved = images[:5] + 0.01
    torch.testing.assert_close(
        nearest_distances(moved, images),
        torch.full((5,), 0.01, dtype=torch.float64),
        atol=1e-6,
        rtol=0,
    )


def test_share_below_counts_ties_half() -> None:
    assert share_below(torch.tensor([1.0, 2.0]), torch.tensor([2.0, 3.0])) == 0.875


def test_copies_are_told_from_new_images(images: torch.Tensor) -> None:
    training, held_out, fresh = images.split(40)
    copies = compare_images(training + 1e-3, training, held_out)
    new = compare_images(fresh, training, held_out)
    assert copies["nearer_than_held_out"] == 1 and copies["nearest_ratio"] < 0.01
    assert abs(new["nearer_than_held_out"] - 0.5) < 0.15


def test_images_of_another_kind_are_further_away(images: torch.Tensor) -> None:
    training, held_out, fresh = images.split(40)
    same = compare_images(fresh, training, held_out)
    smooth = compare_images(fresh.mean(-1, keepdim=True).expand_as(fresh), training, held_out)
    for name in ("pixel_distance", "spectrum_distance"):
        assert smooth[name] > 1.5 * same[name]


def test_more_images_than_training_has_are_refused(images: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="at least 120 images"):
        compare_images(images, images[:10], images[:10])
