"""Which settings of a geolip go together, and their ranges."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ...config import EPSILON_FLOOR, IMPLEMENTATIONS, LAWS

if TYPE_CHECKING:
    from .configuration_geolip import GeolipConfig

# What a learned softening never falls below.
SOFTENING_FLOOR = 1e-4
# Its exponential is a number of float32, too; what starts beyond learns nothing.
_LARGEST_LOGIT = 80
_GRAVITY_SETTINGS = ("gravity_law", "gravity_softening", "learn_softening", "gravity_strength")

_CHOICES = {
    "frame_sign": ("signed", "canon"),
    "spectral_attention": ("dot_product", "gravity"),
    "gravity_law": LAWS,
    "implementation": IMPLEMENTATIONS,
    "lens_mode": ("fixed", "learned"),
    "lens_sign": ("signed", "canon"),
    "feature_norm": ("zscore", "whiten", "none"),
    "reconstruction_loss": ("mse", "cosine", "cosine_mse"),
    "deviation_baseline": ("exact", "mc4096"),
}
# The least that each may be.
_COUNTS = {
    "patch_dim": 1,
    "num_rows": 2,
    "base_dim": 2,
    "lens_dim": 2,
    "hidden_size": 1,
    "encoder_depth": 0,
    "decoder_depth": 0,
    "decoder_hidden_size": 1,
    "num_spectral_layers": 1,
    "num_attention_heads": 1,
    "image_size": 1,
    "patch_size": 1,
    "num_channels": 1,
    "smooth_mid": 1,
    "codebook_size": 1,
    "lens_seed": 0,
}
_MAY_BE_NONE = ("patch_dim", "decoder_hidden_size", "image_size", "patch_size")
_POSITIVE = (
    *("gravity_strength", "envelope_coeff", "engage_alpha_ratio", "alpha_lr_multiplier"),
    "address_temperature",
)
_NOT_NEGATIVE = ("rigidity_weight", "rigidity_margin", "engage_gain")


def check_geolip_config(config: GeolipConfig) -> None:
    """Raise ValueError for what does not fit."""
    for name, least in _COUNTS.items():
        value = getattr(config, name)
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
        fits = fits or (value is None and name in _MAY_BE_NONE)
        _expect(fits, name, f"an integer >= {least}", value)
    for name, known in _CHOICES.items():
        value = getattr(config, name)
        _expect(value in known, name, f"one of {list(known)}", value)
    for name in _POSITIVE:
        value = getattr(config, name)
        _expect(_is_finite(value) and value > 0, name, "a finite number > 0", value)
    for name in _NOT_NEGATIVE:
        value = getattr(config, name)
        _expect(_is_finite(value) and value >= 0, name, "a finite number >= 0", value)
    value = config.max_alpha
    _expect(_is_finite(value) and 0 < value < 1, "max_alpha", "a number in (0, 1)", value)
    value, most = config.alpha_init, _LARGEST_LOGIT
    fits = _is_finite(value) and abs(value) <= most
    _expect(fits, "alpha_init", f"a number in [-{most}, {most}], before a sigmoid", value)
    _check_lens(config)
    _check_images(config)
    _check_gravity(config)


def _check_lens(config: GeolipConfig) -> None:
    width = config.lens_dim
    expected = f">= base_dim ({config.base_dim}), as a lens loses nothing"
    _expect(width >= config.base_dim, "lens_dim", expected, width)
    heads = config.num_attention_heads
    fits = not config.use_spectral or width % heads == 0
    _expect(fits, "lens_dim", f"a multiple of num_attention_heads ({heads})", width)


def _check_images(config: GeolipConfig) -> None:
    size, patch = config.image_size, config.patch_size
    if patch is None:
        for name in ("image_size", "boundary_smooth"):
            value = getattr(config, name)
            _expect(not value, name, "no such setting without patch_size", value)
        return
    _expect(size is None or size % patch == 0, "image_size", f"a multiple of {patch}", size)
    width = config.num_channels * patch**2
    expected = f"num_channels patch_size^2 = {width}, or None"
    _expect(config.patch_dim == width, "patch_dim", expected, config.patch_dim)


def _check_gravity(config: GeolipConfig) -> None:
    if config.spectral_attention != "gravity":
        defaults: dict[str, Any] = {f.name: f.default for f in fields(type(config))}
        for name in _GRAVITY_SETTINGS:
            expected = f"{defaults[name]!r}, the default, beside spectral_attention='dot_product'"
            _expect(getattr(config, name) == defaults[name], name, expected, getattr(config, name))
        return
    _expect(config.use_spectral, "spectral_attention", "use_spectral=True beside it", "gravity")
    value, learned = config.gravity_softening, config.learn_softening
    if value is None:
        return
    fits = _is_finite(value) and (value > SOFTENING_FLOOR if learned else value >= EPSILON_FLOOR)
    least = f"> {SOFTENING_FLOOR}, where it is learned" if learned else f">= {EPSILON_FLOOR}"
    _expect(fits, "gravity_softening", f"a squared distance {least}", value)


def _is_finite(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _expect(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"GeolipConfig.{name}: expected {expected}, got {got!r}")
