"""Which settings of an NGT go together, and their ranges."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ...config import EPSILON_FLOOR, IMPLEMENTATIONS, LAWS

if TYPE_CHECKING:
    from .configuration_ngt import NGTConfig

# What a learned softening never falls below.
SOFTENING_FLOOR = 1e-4
# What a twin has not.
GRAVITY_SETTINGS = (
    *("law", "repulsive", "softening", "learn_softening", "initial_strength", "token_masses"),
    *("mass_in_value", "mass_exponent", "head_bias", "exclude_self", "coordinate_positions"),
    *("position_base", "content_coordinates", "anchor_coordinates", "hidden_head_coordinates"),
    *("asymmetric", "shared_start", "symmetric_heads", "mass_fading", "coordinate_source"),
    *("evolve_last_layer", "cutoff", "initial_radius", "cutoff_width", "use_rsqrt"),
)

_CHOICES = {
    "attention": ("gravity", "dot_product"),
    "positions": ("learned", "sinusoidal", "alibi", "none"),
    "law": LAWS,
    "coordinate_positions": ("sinusoidal", "learned", "learned_sinusoidal"),
    "coordinate_source": ("hidden", "attention", "pre_attention", "none"),
    "cutoff": ("none", "hard", "soft", "log"),
    "implementation": IMPLEMENTATIONS,
}
_COUNTS = (
    *("vocab_size", "hidden_size", "coord_dim", "num_attention_heads", "intermediate_size"),
    *("max_position_embeddings", "head_coord_dim", "num_hidden_layers"),
)
_POSITIVE = (
    *("layer_norm_eps", "initial_strength", "position_base", "cutoff_width", "initializer_range"),
)


def check_ngt_config(config: NGTConfig) -> None:
    """Raise ValueError for what does not fit."""
    for name in _COUNTS:
        value = getattr(config, name)
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        _expect(fits, name, "an integer >= 1", value)
    if config.hidden_size % config.num_attention_heads:
        expected = f"a multiple of num_attention_heads ({config.num_attention_heads})"
        _expect(False, "hidden_size", expected, config.hidden_size)
    for name, known in _CHOICES.items():
        value = getattr(config, name)
        _expect(value in known, name, f"one of {list(known)}", value)
    for name in _POSITIVE:
        value = getattr(config, name)
        _expect(_is_finite(value) and value > 0, name, "a finite number > 0", value)
    fits = _is_finite(config.dropout) and 0 <= config.dropout < 1
    _expect(fits, "dropout", "a number in [0, 1)", config.dropout)
    if config.is_twin:
        _check_twin(config)
    else:
        _check_gravity(config)


def _check_gravity(config: NGTConfig) -> None:
    fits = config.positions == "learned"
    expected = "'learned' beside attention='gravity', whose places are coordinate_positions"
    _expect(fits, "positions", expected, config.positions)
    if config.law != "force":
        for name in ("repulsive", "head_bias"):
            _expect(not getattr(config, name), name, "False beside law='power'", True)
        soft = config.cutoff == "soft"
        _expect(not soft, "cutoff", "'none', 'hard' or 'log' beside law='power'", config.cutoff)
    else:
        _expect(config.mass_fading == 0, "mass_fading", "0 beside law='force'", config.mass_fading)
    share = config.mass_fading
    _expect(_is_finite(share) and 0 <= share <= 1, "mass_fading", "a share in [0, 1]", share)
    count = config.symmetric_heads
    _expect(count >= 0, "symmetric_heads", "an integer >= 0", count)
    radius = config.initial_radius
    _expect(_is_finite(radius), "initial_radius", "a finite number", radius)
    if config.mass_in_value:
        _expect(config.token_masses, "mass_in_value", "False beside token_masses=False", True)
    value, learned = config.softening, config.learn_softening
    fits = _is_finite(value) and (value > SOFTENING_FLOOR if learned else value >= EPSILON_FLOOR)
    least = f"> {SOFTENING_FLOOR}, where it is learned" if learned else f">= {EPSILON_FLOOR}"
    _expect(fits, "softening", f"a squared distance {least}", value)


def _check_twin(config: NGTConfig) -> None:
    defaults: dict[str, Any] = {f.name: f.default for f in fields(type(config))}
    for name in GRAVITY_SETTINGS:
        value = getattr(config, name)
        expected = f"{defaults[name]!r}, the default, beside attention='dot_product', which has no "
        _expect(value == defaults[name], name, expected + "gravity", value)


def _is_finite(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _expect(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"NGTConfig.{name}: expected {expected}, got {got!r}")
