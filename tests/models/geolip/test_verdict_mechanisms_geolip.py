"""Trained models get the verdict that their task calls for: A, B, or an alpha that drifts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gravity_hf.models.geolip import GeolipConfig, GeolipForReconstruction, Verdict
from gravity_hf.models.geolip.verdict import compute_verdict
from gravity_hf.training.geolip.fitting import batches_of, fit
from gravity_hf.training.geolip.synthetic import add_noise, synthetic_images


def measured(
    kind: str, *, size: int, sigma: float, steps: int, seed: int, **options: Any
) -> Verdict:
    """A model trained to find `kind` of images below noise, measured on others."""
    torch.manual_seed(seed)
    training = {name: options.pop(name) for name in ("lr", "batch_size")}
    model = GeolipForReconstruction(GeolipConfig(image_size=size, feature_norm="none", **options))
    images = {"size": size, "patch_size": options["patch_size"]}
    data = synthetic_images(kind, 512, seed=seed, **images)
    fit(model, data, steps=steps, seed=seed, denoise=sigma, **training)
    clean = synthetic_images(kind, 256, seed=seed + 100, **images)
    noisy = add_noise(clean, sigma, seed=seed + 200)
    return compute_verdict(model, batches_of(noisy, 64, labels=clean), steps=steps)


# 16 patches of 4 pixels: those of one image together know its colour far better than each.
SMALL: dict[str, Any] = {
    "size": 8,
    "sigma": 2.0,
    "steps": 200,
    "patch_size": 2,
    "num_rows": 8,
    "hidden_size": 32,
    "lr": 1e-2,
    "batch_size": 32,
}


@pytest.mark.parametrize("seed", range(3))
def test_a_colour_shared_by_all_patches_is_mechanism_a(seed: int) -> None:
    verdict = measured("shared_colour", seed=seed, **SMALL)
    assert verdict.mechanism == "A" and not verdict.alpha_drift
    assert verdict.coordination_gain > 0.03 and verdict.alpha_ratio > 1.5


@pytest.mark.parametrize("seed", range(3))
def test_a_colour_of_its_own_for_each_patch_is_mechanism_b(seed: int) -> None:
    verdict = measured("independent_colour", seed=seed, **SMALL)
    assert verdict.mechanism == "B" and not verdict.alpha_drift
    assert abs(verdict.coordination_gain) < 0.001 and verdict.alpha_ratio < 1.1


def test_alpha_that_rises_where_nothing_is_shared_is_drift() -> None:
    verdict = measured(
        "noise",
        size=8,
        sigma=0.0,
        steps=100,
        seed=0,
        patch_size=4,
        num_rows=16,
        num_spectral_layers=1,
        hidden_size=32,
        alpha_lr_multiplier=10.0,
        lr=3e-3,
        batch_size=32,
    )
    assert verdict.alpha_drift and verdict.mechanism == "B"
    assert abs(verdict.coordination_gain) < 0.001 and verdict.alpha_ratio > 1.2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "mechanism"), [("shared_colour", "A"), ("independent_colour", "B")]
)
@pytest.mark.parametrize("seed", range(3))
def test_mechanisms_at_full_size(kind: str, mechanism: str, seed: int) -> None:
    # The noise is 1.7 times the deviation of a colour. Of twice as much, in as many steps, patches
    # do not learn to ask each other.
    full = {"patch_size": 4, "num_rows": 32, "hidden_size": 96, "lr": 1e-3, "batch_size": 16}
    verdict = measured(kind, size=32, sigma=1.0, steps=800, seed=seed, **full)
    assert verdict.mechanism == mechanism
