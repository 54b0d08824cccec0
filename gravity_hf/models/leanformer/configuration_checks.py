"""Which settings of a LeanFormer go together, and their ranges."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from transformers.activations import ACT2FN

from ...config import EPSILON_FLOOR, LAWS

if TYPE_CHECKING:
    from .configuration_leanformer import LeanFormerConfig

# What a learned softening never falls below.
SOFTENING_FLOOR = 1e-4
_GRAVITY_SETTINGS = (*("gravity_law", "gravity_softening", "learn_softening", "gravity_strength"),)

_CHOICES = {
    "attention": ("dot_product", "gravity"),
    "gravity_law": LAWS,
    "screening": ("learned", "keys", "none"),
    "feed_forward_policy": ("dense", "masked", "block"),
    "norm": ("rms", "layer"),
    "position": ("rope", "learned"),
}
# The least that each may be.
_COUNTS = {
    **dict.fromkeys(
        (
            *("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"),
            *("num_key_value_heads", "head_dim", "intermediate_size", "max_position_embeddings"),
            *("screen_dim", "attention_top_k", "attention_block", "local_window", "gate_rank"),
            *("feed_forward_block", "min_depth", "screening_rows"),
        ),
        1,
    ),
    **dict.fromkeys(
        ("attention_rank", "feed_forward_rank", "sink_tokens", "sparse_min_length", "head_rank"), 0
    ),
}
_MAPS = (
    *(f"self_attn.{x}_proj" for x in "qkvo"),
    *(f"mlp.{x}_proj" for x in ("gate", "up", "down")),
)
_NOT_NEGATIVE = ("screening_weight", "gate_weight", "exit_weight")


def check_leanformer_config(config: LeanFormerConfig, compat: Mapping[str, Any]) -> None:
    """Raise ValueError for what does not fit; `compat`: what `compat_reference` implies."""
    for name, least in _COUNTS.items():
        value = getattr(config, name)
        _expect(_is_count(value, least), name, f"an integer >= {least}", value)
    for name, known in _CHOICES.items():
        value = getattr(config, name)
        _expect(value in known, name, f"one of {list(known)}", value)
    for name in _NOT_NEGATIVE:
        value = getattr(config, name)
        _expect(_is_finite(value) and value >= 0, name, "a finite number >= 0", value)
    for name in ("norm_eps", "gravity_strength", "initializer_range"):
        value = getattr(config, name)
        _expect(_is_finite(value) and value > 0, name, "a finite number > 0", value)
    for name in ("dropout", "feed_forward_sparsity"):
        value = getattr(config, name)
        _expect(_is_finite(value) and 0 <= value < 1, name, "a number in [0, 1)", value)
    known_act = config.hidden_act in ACT2FN
    _expect(known_act, "hidden_act", "a name in transformers.activations.ACT2FN", config.hidden_act)
    _check_heads(config)
    _check_sparsity(config)
    _check_positions(config)
    _check_gravity(config)
    _check_ranks(config)
    if config.compat_reference:
        _check_compat(config, compat)


def _check_heads(config: LeanFormerConfig) -> None:
    heads, shared = config.num_attention_heads, config.num_key_value_heads
    _expect(heads % shared == 0, "num_attention_heads", f"a multiple of {shared}", heads)
    # Where it was left out it was divided out.
    if config.head_dim == config.hidden_size // heads:
        expected = f"a multiple of num_attention_heads ({heads}), or head_dim beside it"
        _expect(config.hidden_size % heads == 0, "hidden_size", expected, config.hidden_size)


def _check_sparsity(config: LeanFormerConfig) -> None:
    kept = config.local_window + config.sink_tokens
    if config.screening != "none" and not config.compat_reference:
        expected = f">= local_window + sink_tokens ({kept}), which are among them"
        _expect(config.attention_top_k >= kept, "attention_top_k", expected, config.attention_top_k)
    if config.screening == "learned" and not config.compat_reference:
        expected = f"at most head_dim ({config.head_dim})"
        _expect(config.screen_dim <= config.head_dim, "screen_dim", expected, config.screen_dim)
    inner, block = config.intermediate_size, config.feed_forward_block
    expected = f"a divisor of intermediate_size ({inner})"
    _expect(inner % block == 0, "feed_forward_block", expected, block)
    layers = config.num_hidden_layers
    expected = f"at most num_hidden_layers ({layers})"
    _expect(config.min_depth <= layers, "min_depth", expected, config.min_depth)
    value = config.exit_threshold
    fits = value is None or (_is_finite(value) and 0 <= value <= 1)
    _expect(fits, "exit_threshold", "None or a probability in [0, 1]", value)
    fits = value is None or config.exit_heads
    _expect(fits, "exit_threshold", "None beside exit_heads=False", value)


def _check_positions(config: LeanFormerConfig) -> None:
    window = config.sliding_window
    _expect(window is None or _is_count(window, 1), "sliding_window", "None or >= 1", window)
    if config.position != "rope":
        return
    width = config.head_dim
    _expect(width % 2 == 0, "head_dim", "an even number beside position='rope'", width)
    partial = (config.rope_parameters or {}).get("partial_rotary_factor", 1.0)
    expected = "no partial_rotary_factor, as all of a head is turned"
    _expect(partial == 1.0, "rope_parameters", expected, config.rope_parameters)


def _check_gravity(config: LeanFormerConfig) -> None:
    if config.attention != "gravity":
        _expect_defaults(config, _GRAVITY_SETTINGS, "attention='dot_product'")
        return
    value, learned = config.gravity_softening, config.learn_softening
    if value is None:
        return
    fits = _is_finite(value) and (value > SOFTENING_FLOOR if learned else value >= EPSILON_FLOOR)
    least = f"> {SOFTENING_FLOOR}, where it is learned" if learned else f">= {EPSILON_FLOOR}"
    _expect(fits, "gravity_softening", f"a squared distance {least}", value)


def fits_name(pattern: str, name: str) -> bool:
    """Whether a name of `rank_pattern` is that of a map, or its last parts."""
    return f".{name}".endswith(f".{pattern.removeprefix('model.')}")


def _check_ranks(config: LeanFormerConfig) -> None:
    layers = [f"layers.{i}." for i in range(config.num_hidden_layers)]
    maps = ["lm_head", *(layer + name for layer in layers for name in _MAPS)]
    for pattern, rank in (config.rank_pattern or {}).items():
        _expect(_is_count(rank, 0), "rank_pattern", f"an integer >= 0 for {pattern!r}", rank)
        known = any(fits_name(pattern, name) for name in maps)
        expected = f"names of maps, or their last parts, such as {maps[1]!r}"
        _expect(known, "rank_pattern", expected, pattern)
    tied, rank = config.tie_word_embeddings, config.rank_of("lm_head", config.head_rank)
    expected = "False beside a head of low rank, which has no weight like that of the embeddings"
    _expect(not (tied and rank), "tie_word_embeddings", expected, tied)


def _check_compat(config: LeanFormerConfig, compat: Mapping[str, Any]) -> None:
    for name, implied in compat.items():
        value = getattr(config, name)
        _expect(value == implied, name, f"{implied!r} beside compat_reference=True", value)
    expected = "'dot_product' beside compat_reference=True"
    _expect(config.attention == "dot_product", "attention", expected, config.attention)
    heads = config.num_attention_heads
    fits = config.num_key_value_heads == heads
    expected = "num_attention_heads, or None, beside compat_reference=True"
    _expect(fits, "num_key_value_heads", expected, config.num_key_value_heads)
    width = config.hidden_size
    # Its screening keys are kept in a cache beside the keys of the heads.
    fits = width % (4 * heads) == 0 and config.head_dim * heads == width
    expected = f"a multiple of 4 num_attention_heads ({4 * heads}) beside compat_reference=True"
    _expect(fits, "hidden_size", expected, width)
    _expect(config.head_rank >= 1, "head_rank", ">= 1 beside compat_reference=True", 0)
    fits = not config.qk_norm and config.screening == "learned" and config.exit_heads
    expected = "False, 'learned' and True beside compat_reference=True"
    got = (config.qk_norm, config.screening, config.exit_heads)
    _expect(fits, "qk_norm, screening and exit_heads", expected, got)


def _expect_defaults(config: LeanFormerConfig, names: tuple[str, ...], beside: str) -> None:
    defaults: dict[str, Any] = {f.name: f.default for f in fields(type(config))}
    for name in names:
        value = getattr(config, name)
        _expect(value == defaults[name], name, f"{defaults[name]!r}, beside {beside}", value)


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_finite(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _expect(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"LeanFormerConfig.{name}: expected {expected}, got {got!r}")
