"""What an NGT is, and what its twin is, in words; from their configs, as no model is imported."""

from __future__ import annotations

import math

from transformers import PreTrainedConfig

NGT = "ngt"

_LAWS = {
    (False, False): "weights proportional to 1 / (d^2 + e)^g",
    (False, True): "weights proportional to m_j{power} / (d^2 + e)^g",
    (True, False): "softmax over {sign}g / (d^2 + e){bias}",
    (True, True): "softmax over m_i m_j ({sign}g / (d^2 + e){bias})",
}
_MOVED = {
    "hidden": "moved by the attention output and the hidden state",
    "attention": "moved by the attention output",
    "pre_attention": "moved by the hidden state before attention",
    "none": "never moved",
}
_CUTOFFS = {
    "none": "no cutoff",
    "hard": "hard cutoff",
    "log": "cutoff by a logistic function",
    "soft": "soft cutoff as published, which hides nothing",
}


def is_twin(config: PreTrainedConfig) -> bool:
    """Whether a config of our own is that of a model without gravity, made to compare with."""
    return getattr(config, "attention", None) == "dot_product"


def ngt_in_words(config: PreTrainedConfig) -> tuple[str, ...]:
    """The law of an NGT, its coordinates, and what a token sees, a line each; what a twin has
    instead."""
    if is_twin(config):
        return (
            "the dot-product twin of an NGT: no gravity, no masses, no coordinates; causal",
            f"positions {config.positions}",
        )
    return (
        f"law {config.law}: {_law(config)}; causal",
        _coordinates(config),
        f"softening {config.softening:g}{_learned(config)}, {_cutoff(config)}, {_itself(config)}",
        f"{_masses(config)}{_fading(config)}",
    )


def ngt_sizes_in_words(config: PreTrainedConfig) -> str:
    """Layers, heads, width, and what can be read."""
    table = config.has_position_table or config.crop_long_inputs
    reach = f"{config.max_position_embeddings} positions" if table else "positions without end"
    return (
        f"{config.num_hidden_layers} layers, {config.num_attention_heads} heads, width "
        f"{config.hidden_size}, vocabulary {config.vocab_size}, {reach}"
    )


def _law(config: PreTrainedConfig) -> str:
    in_scores = config.token_masses and not config.mass_in_value
    words = _LAWS[config.law == "force", in_scores].format(
        sign="-" if config.repulsive else "",
        bias=" + beta" if config.head_bias else "",
        power="^mu" if config.mass_exponent else "",
    )
    return f"{words}; closeness repels, as published" if config.repulsive else words


def _coordinates(config: PreTrainedConfig) -> str:
    parts = [f"{config.coordinate_positions} places"]
    parts += ["content"] if config.content_coordinates else []
    parts += ["places again in every layer"] if config.anchor_coordinates else []
    parts += ["the hidden state in every layer"] if config.hidden_head_coordinates else []
    began = " that began as copies" if config.shared_start else ""
    own = config.key_heads
    first = "head" if own == 1 else f"{own} heads"
    where = f" in the first {first}" if own < config.num_attention_heads else ""
    maps = f", keys{where} by maps of their own{began}" if own else ""
    return (
        f"{config.coord_dim} coordinates, {config.head_coord_dim} in each head, of "
        f"{', '.join(parts)}{maps}; {_MOVED[config.coordinate_source]}"
    )


def _learned(config: PreTrainedConfig) -> str:
    return " at the start, learned per head" if config.learn_softening else ""


def _cutoff(config: PreTrainedConfig) -> str:
    words = _CUTOFFS[config.cutoff]
    if config.cutoff == "none":
        return words
    radius = float(config.initial_radius)
    # softplus, which is its argument where exp would overflow.
    start = math.log1p(math.exp(radius)) if radius < 30 else radius
    return f"{words} at a learned radius, {start:.3g} at the start"


def _itself(config: PreTrainedConfig) -> str:
    return "a token does not see itself" if config.exclude_self else "a token sees itself"


def _masses(config: PreTrainedConfig) -> str:
    if not config.token_masses:
        return "all masses are 1"
    where = "multiply the values" if config.mass_in_value else "enter the scores"
    return f"one learned mass for each token type; masses {where}"


def _fading(config: PreTrainedConfig) -> str:
    count, heads = config.fading_heads, config.num_attention_heads
    return f"; what is older weighs less in {count} of {heads} heads" if count else ""
