"""A prior and its geolip: which one decodes, which are refused, and what comes of it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from gravity_hf.models.geolip import GeolipConfig, GeolipForReconstruction, GeolipModel
from gravity_hf.models.geolip.modeling_prior import GeolipPrior
from gravity_hf.models.geolip.prior_decoding import (
    decode_images,
    decoder_digest,
    generate_images,
)


def new_geolip(**settings: object) -> GeolipForReconstruction:
    torch.manual_seed(4)
    sizes = {"patch_size": 2, "num_channels": 1, "num_rows": 4, "hidden_size": 8, "lens_dim": 8}
    return GeolipForReconstruction(GeolipConfig(**{**sizes, **settings})).eval()


@pytest.fixture(scope="module")
def geolip() -> GeolipForReconstruction:
    return new_geolip()


@pytest.fixture(scope="module")
def prior(geolip: GeolipForReconstruction) -> GeolipPrior:
    torch.manual_seed(1)
    shape = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    return GeolipPrior.for_geolip(geolip, 4, **shape).eval()


def test_images_are_the_decoded_samples(
    geolip: GeolipForReconstruction, prior: GeolipPrior
) -> None:
    images = generate_images(prior, geolip, 3, seed=5, steps=2)
    decoded = geolip.decode(prior.sample(3, seed=5, steps=2))
    assert images.shape == (3, 1, 4, 4)
    torch.testing.assert_close(images, geolip.stitch(decoded, 4, 4))


def test_a_size_that_is_no_square_is_given(
    geolip: GeolipForReconstruction, prior: GeolipPrior
) -> None:
    images = generate_images(prior, geolip, 1, steps=1, height=2, width=8)
    assert images.shape == (1, 1, 2, 8)
    with pytest.raises(ValueError, match="makes 4 patches of 2 pixels, got 2 x 6"):
        generate_images(prior, geolip, 1, steps=1, height=2, width=6)


def test_the_geolip_is_known_again_when_both_are_loaded(
    geolip: GeolipForReconstruction, prior: GeolipPrior, tmp_path: Path
) -> None:
    geolip.save_pretrained(tmp_path / "geolip")
    prior.save_pretrained(tmp_path / "prior")
    loaded = GeolipPrior.from_pretrained(tmp_path / "prior")
    again = GeolipModel.from_pretrained(tmp_path / "geolip")
    torch.testing.assert_close(
        generate_images(loaded, again, 2, seed=1, steps=2),
        generate_images(prior, geolip, 2, seed=1, steps=2),
    )
    named = GeolipPrior.for_geolip(again, 4, hidden_size=8, num_attention_heads=2)
    assert named.config.geolip_name_or_path == str(tmp_path / "geolip")


@pytest.mark.parametrize("name", ["decoder.proj_out.bias", "lens.basis", "feature_std"])
def test_another_decoder_is_refused(
    geolip: GeolipForReconstruction, prior: GeolipPrior, name: str
) -> None:
    other = copy.deepcopy(geolip)
    other.state_dict()[name].add_(1e-3)
    with pytest.raises(ValueError, match="expected the geolip whose decoder has the digest"):
        generate_images(prior, other, 1, steps=1)


def test_settings_that_change_what_is_decoded_are_in_the_digest(
    geolip: GeolipForReconstruction,
) -> None:
    assert decoder_digest(new_geolip()) == decoder_digest(geolip)
    assert decoder_digest(new_geolip(max_alpha=0.3)) != decoder_digest(geolip)


def test_another_encoder_speaks_the_same_language(
    geolip: GeolipForReconstruction, prior: GeolipPrior
) -> None:
    other = copy.deepcopy(geolip)
    other.encoder.proj_in.weight.data.mul_(2)
    prior.check_geolip(other)


def test_frames_of_another_size_are_refused(prior: GeolipPrior) -> None:
    with pytest.raises(ValueError, match="a geolip with num_rows 4, got 8"):
        prior.check_geolip(new_geolip(num_rows=8))


def test_a_geolip_of_features_makes_no_images() -> None:
    geolip = new_geolip(patch_size=None, patch_dim=6)
    prior = GeolipPrior.for_geolip(geolip, 4, hidden_size=8, num_attention_heads=2)
    with pytest.raises(ValueError, match="expected a geolip with config.patch_size"):
        generate_images(prior, geolip, 1)


def test_decoding_leaves_the_mode_as_it_was(geolip: GeolipForReconstruction) -> None:
    training = copy.deepcopy(geolip).train()
    decode_images(training, torch.ones(1, 4, 4, 4) / 2, 4, 4)
    assert training.training
