"""How published LeanFormers call what is called otherwise here: weights, settings.

Published factors are `A` `[in, r]` and `B` `[r, out]`, of `y = (x A) B + bias`; here they are
`down.weight` `[r, in]` and `up.weight` `[out, r]`, their transposes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..converting import plain_config_errors, some_of
from .configuration_leanformer import LeanFormerConfig

# Published on the left, within a layer. A name that ends with a dot is of a map in two factors.
_IN_LAYER = {
    **{f"attn.{x}.": f"self_attn.{x}." for x in ("q_proj", "k_proj", "v_proj")},
    "attn.out_proj.": "self_attn.o_proj.",
    **{f"attn.{x}.": f"self_attn.{x}." for x in ("q_screen", "k_screen")},
    **{f"ff.{x}.": f"mlp.{x}." for x in ("up_proj", "gate_proj", "down_proj")},
    "ff.activation_gate.": "mlp.predictor.",
    "norm1": "input_layernorm",
    "norm2": "post_attention_layernorm",
}
_OUTSIDE = {
    "token_embedding": "model.embed_tokens",
    "position_embedding": "model.embed_positions",
    "norm": "model.norm",
    "lm_head.": "lm_head.",
    "depth_controller.exit_head.0": "model.exit_head.down",
    "depth_controller.exit_head.2": "model.exit_head.up",
}
_FACTORS = {"A": "down.weight", "B": "up.weight", "bias": "up.bias"}
_LAYER = re.compile(r"layers\.(\d+)\.(.+)")

# Published settings, as published code fills them in. None: it has no default that is used.
DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257,
    "d_model": 512,
    "n_heads": 8,
    "n_layers": 12,
    "d_ff": 2048,
    "max_seq_len": 1024,
    "attention_rank": 32,
    "ff_rank": 32,
    "screening_rank": 8,
    "attention_top_k": 64,
    "ff_gate_rank": 8,
    "ff_sparsity_target": 0.8,
    "min_depth": 2,
    "exit_threshold": 0.01,
    "dropout": 0.1,
}
# Of facts that are added to a model later, not of the model.
_OF_DELTAS = ("delta_rank", "max_active_deltas", "delta_encoding_steps", "delta_encoding_lr")
# What the weights do not tell, and what changes what a model computes.
NEEDED = ("n_heads", "attention_top_k", "ff_sparsity_target")
# The mask of a causal model, kept in the state dict of a published one.
BUFFER = "causal_mask"


def published_config(**published: Any) -> LeanFormerConfig:
    """The config of a published model by the names and defaults of its own.

    It never leaves early: the published rule looks at the whole batch, later tokens among it.
    Neurons are masked, as published models do it outside training.

    Raises:
        ValueError: unknown names, or values out of range.
    """
    _check_names(published)
    said = {**DEFAULTS, **{k: v for k, v in published.items() if k in DEFAULTS}}
    with plain_config_errors():
        return LeanFormerConfig(
            compat_reference=True,
            vocab_size=said["vocab_size"],
            hidden_size=said["d_model"],
            num_attention_heads=said["n_heads"],
            num_hidden_layers=said["n_layers"],
            intermediate_size=said["d_ff"],
            max_position_embeddings=said["max_seq_len"],
            attention_rank=said["attention_rank"],
            feed_forward_rank=said["ff_rank"],
            screen_dim=said["screening_rank"],
            gate_rank=said["ff_gate_rank"],
            attention_top_k=said["attention_top_k"],
            feed_forward_sparsity=_sparsity(said["d_ff"], said["ff_sparsity_target"]),
            feed_forward_policy="masked",
            min_depth=_depth(said["min_depth"], said["n_layers"]),
            dropout=said["dropout"],
        )


def config_of(state: Mapping[str, Tensor], published: Mapping[str, Any]) -> LeanFormerConfig:
    """The config of published weights: sizes by them, the rest by the settings that are given.

    Raises:
        ValueError: `NEEDED` settings that are not given, unknown ones, settings that the weights
            contradict, or weights of no such model.
    """
    _check_names(published)
    sizes = sizes_of(state)
    missing = [name for name in NEEDED if name not in published]
    if missing:
        raise ValueError(
            f"settings: expected {', '.join(NEEDED)}, which the weights do not tell, got no "
            f"{', '.join(missing)}. They are in leanformer_config.json, beside the weights"
        )
    clamps = _clamps(sizes)
    for name, size in sizes.items():
        value = published.get(name)
        # Published code takes a rank that is too large for the largest that fits.
        if value is not None and min(value, clamps.get(name, value)) != size:
            raise ValueError(
                f"{name}: expected {size}, which the weights say, got {value!r}. Leave it out, or "
                "check that these are the weights that are meant"
            )
    return published_config(**{**published, **sizes})


def sizes_of(state: Mapping[str, Tensor]) -> dict[str, int]:
    """What the weights tell, by published names.

    Raises:
        ValueError: weights of no such model.
    """
    query, gate = "layers.0.attn.q_proj.A", "layers.0.ff.activation_gate.A"
    up, screen = "layers.0.ff.up_proj.", "layers.0.attn.q_screen.A"
    tables = ("token_embedding.weight", "position_embedding.weight")
    needed = [*tables, query, gate, screen, f"{up}A", f"{up}B"]
    missing = [key for key in needed if key not in state or state[key].dim() != 2]
    if missing:
        raise ValueError(
            "checkpoint: expected the weights of a published LeanFormer (token_embedding.weight, "
            f"layers.0.attn.q_proj.A, ...), got no matrix {some_of(missing)} among "
            f"{some_of(state)}. Check that the file holds such a model"
        )
    layers = {match[1] for key in state if (match := _LAYER.fullmatch(key))}
    return {
        "vocab_size": state[tables[0]].shape[0],
        "d_model": state[tables[0]].shape[1],
        "n_layers": len(layers),
        "d_ff": state[f"{up}B"].shape[1],
        "max_seq_len": state[tables[1]].shape[0],
        "attention_rank": state[query].shape[1],
        "ff_rank": state[f"{up}A"].shape[1],
        "screening_rank": state[screen].shape[1],
        "ff_gate_rank": state[gate].shape[1],
    }


def our_state(published: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of `LeanFormerForCausalLM`, by our names, in our shapes.

    Raises:
        ValueError: names that a published model does not have.
    """
    named = {key: our_name(key) for key in published if not is_buffer(key)}
    unknown = [key for key, name in named.items() if name is None]
    if unknown:
        raise ValueError(
            f"checkpoint: expected the names of a published LeanFormer, got {some_of(unknown)} "
            "beside them. What these are for is not known, and nothing is left out"
        )
    return {
        name: published[key].mT.contiguous() if key.endswith((".A", ".B")) else published[key]
        for key, name in named.items()
        if name is not None
    }


def our_name(published: str) -> str | None:
    """Of one weight, `layers.0.attn.q_proj.A` say; None where there is no such one."""
    layer = _LAYER.fullmatch(published)
    table, start, rest = _OUTSIDE, "", published
    if layer is not None:
        table, start, rest = _IN_LAYER, f"model.layers.{layer[1]}.", layer[2]
    part, _, kind = rest.rpartition(".")
    if f"{part}." in table and kind in _FACTORS:
        return f"{start}{table[f'{part}.']}{_FACTORS[kind]}"
    if part in table and kind in ("weight", "bias"):
        return f"{start}{table[part]}.{kind}"
    return None


def is_buffer(key: str) -> bool:
    """Whether a published state dict has something under this name that is no weight."""
    return key.rpartition(".")[2] == BUFFER


def _depth(least: int, layers: int) -> int:
    """Below the number of layers, so that there is a place for the head that all of them have."""
    fits = isinstance(least, int) and least >= 0
    if not fits:
        raise ValueError(f"min_depth: expected a whole number, got {least!r}")
    return max(1, min(least, layers - 1))


def _sparsity(inner: int, target: float) -> float:
    """The share that leaves as many neurons as published code computes, which rounds down."""
    fits = isinstance(target, int | float) and 0 <= target < 1
    if not fits:
        raise ValueError(f"ff_sparsity_target: expected a number in [0, 1), got {target!r}")
    return 1 - max(1, int(inner * (1 - target))) / inner


def _clamps(sizes: Mapping[str, int]) -> dict[str, int]:
    width, inner = sizes["d_model"], sizes["d_ff"]
    return {
        "attention_rank": width,
        "ff_rank": min(width, inner),
        "screening_rank": width // 4,
        "ff_gate_rank": min(width, inner),
    }


def _check_names(published: Mapping[str, Any]) -> None:
    unknown = [str(name) for name in published if name not in (*DEFAULTS, *_OF_DELTAS)]
    if unknown:
        raise ValueError(
            f"settings: expected published ones, {sorted(DEFAULTS)}, got {some_of(unknown)}. A "
            "setting that is not understood may be another model"
        )
