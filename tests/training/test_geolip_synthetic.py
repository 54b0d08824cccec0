"""Images made by rules: by seed, in [-1, 1], and of the kind that their name says."""

from __future__ import annotations

import pytest
import torch

from gravity_hf.models.geolip.patches import patchify
from gravity_hf.training.geolip.synthetic import KINDS, add_noise, synthetic_images


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_pixels_by_seed(kind):
    images = synthetic_images(kind, 5, 12, 4, seed=1)
    assert images.shape == (5, 3, 12, 12) and images.dtype == torch.float32
    assert images.abs().max() <= 1 and images.std() > 0.1
    assert torch.equal(images, synthetic_images(kind, 5, 12, 4, seed=1))
    assert not torch.equal(images, synthetic_images(kind, 5, 12, 4, seed=2))
    # So that a longer training sees the images of a shorter one, too.
    assert torch.equal(images[:2], synthetic_images(kind, 2, 12, 4, seed=1))


def test_torch_keeps_its_random_numbers():
    before = torch.get_rng_state()
    add_noise(synthetic_images("shapes", 2, 8), 1.0)
    assert torch.equal(before, torch.get_rng_state())


def spread_between_patches(kind):
    patches = patchify(synthetic_images(kind, 64, 16, 4), 4)
    return patches.mean(-1).std(1).mean()


def test_colours_are_shared_or_of_each_patch():
    for kind in ("shared_colour", "independent_colour"):
        pixels = patchify(synthetic_images(kind, 3, 8, 4), 4).unflatten(-1, (3, 16))
        assert torch.equal(pixels, pixels[..., :1].expand_as(pixels))
    assert spread_between_patches("shared_colour") == 0
    assert spread_between_patches("independent_colour") > 0.2


def test_patches_of_noise_say_nothing_of_each_other():
    patches = patchify(synthetic_images("noise", 2000, 8, 4), 4)
    first, second = patches[:, 0] - patches[:, 0].mean(0), patches[:, 1] - patches[:, 1].mean(0)
    correlation = (first.T @ second) / 2000 / patches.var()
    assert correlation.abs().max() < 0.12


@pytest.mark.parametrize("kind", ["shapes", "waves"])
def test_structured_images_go_on_over_the_edges_of_patches(kind):
    images = synthetic_images(kind, 64, 32, 4)
    across_edges = (images[..., 4::4] - images[..., 3:-1:4]).square().mean()
    apart = (images - images[torch.arange(63, -1, -1)]).square().mean()
    assert across_edges < 0.1 * apart


def test_noise_has_the_deviation_that_is_asked_for():
    images = synthetic_images("shapes", 16, 16)
    noise = add_noise(images, 2.0, seed=3) - images
    assert noise.std().item() == pytest.approx(2.0, rel=0.03)
    assert torch.equal(add_noise(images, 2.0, 3), add_noise(images, 2.0, 3))
    assert not torch.equal(add_noise(images, 2.0, 3), add_noise(images, 2.0, 4))


@pytest.mark.parametrize(
    "wrong", [{"kind": "clouds"}, {"count": 0}, {"size": 0}, {"size": 10, "patch_size": 4}]
)
def test_what_cannot_be_made_is_said(wrong):
    with pytest.raises(ValueError, match="synthetic_images"):
        synthetic_images(**wrong)
