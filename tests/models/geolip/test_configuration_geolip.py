"""The settings of a geolip: sizes, what goes together, and what a folder keeps of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from gravity_hf.models.geolip import GEOLIP_PRESETS, GeolipConfig, GeolipModel

WIDE = {"hidden_size": 256, "num_rows": 32}


@pytest.mark.parametrize(
    ("preset", "settings", "expected"),
    [
        ("tiny", {"patch_dim": 128}, 76_896),
        ("tiny", {"patch_dim": 768}, 159_456),
        ("base", {"patch_dim": 768, **WIDE}, 824_928),
        ("wide", {"patch_dim": 768, **WIDE}, 1_249_536),
    ],
)
def test_models_have_the_published_numbers_of_parameters(
    preset: str, settings: dict[str, Any], expected: int
) -> None:
    with torch.device("meta"):
        model = GeolipModel(GeolipConfig.from_preset(preset, **settings))
    assert model.num_parameters() == expected


def test_presets_are_the_class_and_two_with_128_rows() -> None:
    sizes = ("num_rows", "hidden_size", "lens_dim", "base_dim")
    found = {
        name: tuple(getattr(GeolipConfig.from_preset(name), x) for x in sizes)
        for name in GEOLIP_PRESETS
    }
    assert found == {
        "tiny": (32, 64, 16, 4),
        "base": (128, 256, 16, 4),
        "wide": (128, 256, 64, 4),
    }
    with pytest.raises(ValueError, match=r"one of \['tiny', 'base', 'wide'\], got 'huge'"):
        GeolipConfig.from_preset("huge")


def test_alpha_starts_at_its_published_value() -> None:
    assert GeolipConfig().alpha_start == pytest.approx(0.0238406, abs=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_row": 8}, "num_row.*Did you mean num_rows"),
        ({"lens_dim": 3, "num_attention_heads": 1}, r"lens_dim: expected >= base_dim \(4\)"),
        ({"lens_dim": 18}, r"a multiple of num_attention_heads \(4\), got 18"),
        ({"num_rows": 1}, "num_rows: expected an integer >= 2, got 1"),
        ({"base_dim": 1}, "base_dim: expected an integer >= 2, got 1"),
        ({"max_alpha": 1.0}, r"max_alpha: expected a number in \(0, 1\), got 1.0"),
        ({"max_alpha": 0.0}, "max_alpha"),
        ({"alpha_init": -1000.0}, r"alpha_init: expected a number in \[-80, 80\]"),
        ({"lens_mode": "orthogonal"}, r"one of \['fixed', 'learned'\], got 'orthogonal'"),
        ({"spectral_attention": "cosine"}, "spectral_attention: expected one of"),
        ({"gravity_strength": 2.0}, "3.5, the default, beside spectral_attention='dot_product'"),
        ({"spectral_attention": "gravity", "use_spectral": False}, "use_spectral=True"),
        ({"spectral_attention": "gravity", "gravity_softening": 1e-5}, "gravity_softening"),
        ({"boundary_smooth": True}, "boundary_smooth: expected no such setting without patch_size"),
        ({"patch_size": 4, "image_size": 18}, "image_size: expected a multiple of 4, got 18"),
        ({"patch_size": 4, "patch_dim": 16}, r"num_channels patch_size\^2 = 48, or None, got 16"),
        ({"rigidity_weight": -1.0}, "rigidity_weight: expected a finite number >= 0"),
        ({"address_temperature": 0.0}, "address_temperature: expected a finite number > 0"),
        ({"hidden_size": "64"}, "hidden_size"),
    ],
)
def test_what_does_not_fit_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=message):
        GeolipConfig(**settings)


def test_decoder_is_as_wide_as_the_encoder_unless_it_says_otherwise() -> None:
    for given, expected in ((None, 32), (24, 24)):
        config = GeolipConfig(patch_dim=8, hidden_size=32, decoder_hidden_size=given)
        assert GeolipModel(config).decoder.proj_out.in_features == expected


def test_a_model_needs_to_know_what_it_reconstructs() -> None:
    with pytest.raises(ValueError, match="Set patch_dim to the width of a host's features, or pa"):
        GeolipModel(GeolipConfig())


@pytest.mark.parametrize(
    "settings",
    [
        # Each equals what the class would derive or start from, with another setting beside it.
        {"patch_dim": 48, "hidden_size": 256, "decoder_hidden_size": 64},
        {"patch_size": 4, "num_channels": 1, "image_size": 16},
        {"spectral_attention": "gravity", "gravity_law": "force", "gravity_softening": 2.0},
        {"verdict": {"mechanism": "B", "recon_cosine": 0.9}, "host_config": {"layer": -1}},
    ],
)
def test_a_folder_keeps_every_setting(settings: dict[str, Any], tmp_path: Path) -> None:
    config = GeolipConfig(**settings)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, GeolipConfig) and loaded.to_dict().items() >= settings.items()
    assert loaded.to_diff_dict() == config.to_diff_dict()
    assert (loaded.decoder_width, loaded.patch_dim) == (config.decoder_width, config.patch_dim)
