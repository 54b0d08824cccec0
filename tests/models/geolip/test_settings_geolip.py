"""Every setting of a geolip does something: none is there that nothing reads."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig

from gravity_hf.models.geolip import GeolipConfig, GeolipForReconstruction
from gravity_hf.models.geolip.verdict import alpha_drift, mechanism_of

from .geolip_cases import IMAGES, SMALL, tiny, tokens

GRAVITY = {"spectral_attention": "gravity"}
# Another value of each, and what has to stand beside it for a difference.
CHANGES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "patch_dim": ({"patch_dim": 9}, {}),
    "num_rows": ({"num_rows": 7}, {}),
    "base_dim": ({"base_dim": 3}, {}),
    "lens_dim": ({"lens_dim": 8}, {}),
    "hidden_size": ({"hidden_size": 8}, {}),
    "encoder_depth": ({"encoder_depth": 0}, {}),
    "decoder_depth": ({"decoder_depth": 2}, {}),
    "decoder_hidden_size": ({"decoder_hidden_size": 8}, {}),
    "block_norm": ({"block_norm": False}, {}),
    "decoder_block_norm": ({"decoder_block_norm": False}, {}),
    "frame_sign": ({"frame_sign": "canon"}, {}),
    "use_spectral": ({"use_spectral": False}, {}),
    "num_spectral_layers": ({"num_spectral_layers": 1}, {}),
    "num_attention_heads": ({"num_attention_heads": 2}, {}),
    "max_alpha": ({"max_alpha": 0.3}, {}),
    "alpha_init": ({"alpha_init": 1.0}, {}),
    "is_causal": ({"is_causal": True}, {}),
    "spectral_attention": (GRAVITY, {}),
    "gravity_law": ({"gravity_law": "force"}, GRAVITY),
    "gravity_softening": ({"gravity_softening": 0.2}, GRAVITY),
    "learn_softening": ({"learn_softening": False}, GRAVITY),
    "gravity_strength": ({"gravity_strength": 1.0}, GRAVITY),
    "lens_mode": ({"lens_mode": "learned"}, {}),
    "lens_seed": ({"lens_seed": 1}, {}),
    "lens_sign": ({"lens_sign": "canon"}, {}),
    "stem_detach": ({"stem_detach": True}, {}),
    "patch_size": ({"patch_size": 2}, IMAGES),
    "num_channels": ({"num_channels": 2}, IMAGES),
    "boundary_smooth": ({"boundary_smooth": True}, IMAGES),
    "smooth_mid": ({"smooth_mid": 3}, {**IMAGES, "boundary_smooth": True}),
    "feature_norm": ({"feature_norm": "none"}, {}),
    "reconstruction_loss": ({"reconstruction_loss": "cosine"}, {}),
    "rigidity_weight": ({"rigidity_weight": 10.0}, {}),
    "rigidity_margin": ({"rigidity_margin": 0.1}, {"rigidity_weight": 10.0}),
    "envelope_coeff": ({"envelope_coeff": 0.001}, {"rigidity_weight": 10.0}),
    "deviation_baseline": ({"deviation_baseline": "mc4096"}, {}),
    "codebook_size": ({"codebook_size": 5}, {}),
    "address_temperature": ({"address_temperature": 1.0}, {}),
}
# Read elsewhere: by verdicts, below; by optimisers; of images by a processor; by cards.
ELSEWHERE = {
    *("engage_alpha_ratio", "engage_gain", "alpha_lr_multiplier", "image_size"),
    *("host_config", "verdict", "implementation"),
}


def trace(settings: dict[str, Any]) -> list[Any]:
    """Shapes of the state, which of it learns, and what comes out of a model with statistics."""
    torch.manual_seed(0)
    config = GeolipConfig(**{**SMALL, **settings})
    model = GeolipForReconstruction(config).eval()
    weights = {name: weight.requires_grad for name, weight in model.named_parameters()}
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    width = config.patch_dim
    if config.feature_norm != "none":
        model.set_feature_statistics(torch.ones(width), torch.full((width,), 2.0))
    x = torch.randn(2, 4, width, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output, address = model(x), model.address(x)
    numbers = [*output.to_tuple(), *address]
    return [shapes, weights, *(value.flatten().tolist() for value in numbers)]


@pytest.mark.parametrize("name", CHANGES)
def test_setting_changes_a_model(name: str) -> None:
    changed, beside = CHANGES[name]
    assert trace({**beside, **changed}) != trace(beside)


def test_every_setting_is_known_to_do_something() -> None:
    own = {x.name for x in fields(GeolipConfig)} - {x.name for x in fields(PreTrainedConfig)}
    assert own == {*CHANGES, *ELSEWHERE}


def test_a_verdict_asks_for_what_the_settings_say() -> None:
    for settings, found in (
        ({}, ("A", False)),
        ({"engage_gain": 0.2}, ("B", True)),
        ({"engage_alpha_ratio": 2.0}, ("B", False)),
    ):
        config = GeolipConfig(**settings)
        assert (mechanism_of(0.1, 1.5, config), alpha_drift(0.1, 1.5, config)) == found


def test_gravity_is_computed_as_the_settings_say() -> None:
    """By that implementation and no other, as one that cannot serve a call says."""
    with pytest.raises(ValueError, match="impl='flex' expects inputs without gradient"):
        tiny(**GRAVITY, implementation="flex")(tokens())
