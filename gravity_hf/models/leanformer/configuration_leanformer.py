"""Settings of a LeanFormer: sizes, ranks, what is sparse, and when a token may leave early."""

from __future__ import annotations

from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..settings import settle_names
from .configuration_checks import check_leanformer_config, fits_name

# Of a new model's softening, in squared lengths of one coordinate of a head.
_SOFTNESS = 0.3125
# Transformers takes them beside the settings, and enters them into `rope_parameters`.
_OF_ROPE = ("rope_theta", "rope_scaling")
# What published checkpoints all have, and settings of a new model do not.
COMPAT_SETTINGS: dict[str, Any] = {
    "position": "learned",
    "norm": "layer",
    "tie_word_embeddings": False,
    "attention_bias": True,
    "attention_output_bias": True,
    "mlp_bias": True,
    "attention_block": 1,
    "local_window": 1,
    "sink_tokens": 0,
    "feed_forward_block": 1,
}


def _sizes(hidden: int, heads: int, layers: int, inner: int, length: int, rank: int) -> Any:
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "intermediate_size": inner,
        "max_position_embeddings": length,
        "attention_rank": rank,
        "feed_forward_rank": rank,
        "screen_dim": rank // 4,
        "gate_rank": rank // 4,
    }


# Shapes as published; everything else is the class's own.
LEANFORMER_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        **_sizes(128, 4, 4, 512, 256, 16),
        **{"attention_top_k": 32, "local_window": 16, "min_depth": 1},
    },
    "demo": {
        **_sizes(256, 4, 6, 1024, 256, 24),
        **{"attention_top_k": 32, "local_window": 16, "min_depth": 1},
    },
    "small": _sizes(512, 8, 12, 2048, 1024, 32),
    "base": {**_sizes(512, 8, 12, 2048, 2048, 64), "min_depth": 4},
    "large": {
        **_sizes(1536, 24, 20, 6144, 2048, 192),
        **{"attention_top_k": 96, "local_window": 48, "min_depth": 6},
    },
}


@strict
class LeanFormerConfig(PreTrainedConfig):
    """Settings of a LeanFormer, a decoder whose maps are factorised and whose work is chosen.

    A layer computes `x = x + attn(norm(x))`, `x = x + mlp(norm(x))`. Every map of `in` to `out`
    numbers is a product of two of the given rank. Attention looks at the keys that a cheap first
    pass, the screening, ranks highest for a query, at the last ones and at the first ones; the
    feed-forward network computes the blocks of neurons that a small predictor ranks highest for a
    token; and a token may leave after a layer that a small head calls sure. All three are chosen
    for each token from itself and what stands before it.

    The published names are accepted, too: `d_model`, `n_heads`, `n_kv_heads`, `n_layers`, `d_ff`,
    `max_seq_len`, `ff_rank`, `ff_gate_rank`, `ff_sparsity_target`, `screening_rank`.

    Args:
        num_key_value_heads: query heads are a multiple of them; None: as many.
        head_dim: None: `hidden_size / num_attention_heads`.
        attention_rank: of q, k, v and o; 0: dense maps.
        feed_forward_rank: of gate, up and down; 0: dense maps.
        rank_pattern: rank by a map's name, or its last parts: `{"o_proj": 0,
            "layers.3.mlp.up_proj": 8}`. The longest name that fits wins, over all other ranks.
        hidden_act: transformers' name of what the gate goes through.
        attention: `"dot_product"`, or `"gravity"`: by the distance of query and key, so that
            screening looks for the nearest neighbours. Only gravity has the settings from
            `gravity_law` to `gravity_strength`.
        gravity_law: `"power"` or `"force"`, as in `gravity_attention`.
        gravity_softening: at the start, in units of squared distance. None: `0.3125 head_dim`.
        learn_softening: one per head, `softplus(.) + 1e-4`.
        gravity_strength: at the start, of each head, `softplus(.)`.
        screening: `"learned"`: by `screen_dim` numbers made of queries and keys, which learn to
            rank as attention does; `"keys"`: by queries and keys themselves; `"none"`: attention
            is dense.
        screen_dim: of the learned screening; with `compat_reference` the rank of its maps.
        attention_top_k: keys of a query, those of the window and the sinks among them.
        attention_block: keys are chosen in blocks of so many; 1: one by one.
        local_window: the last keys, which are always seen, the token's own first.
        sink_tokens: the first keys, which are always seen.
        sparse_min_length: up to so many keys all are seen.
        feed_forward_sparsity: the share of neurons that a token leaves out, in [0, 1).
        feed_forward_block: neurons are chosen in blocks of so many; divides `intermediate_size`.
        gate_rank: of the predictor.
        feed_forward_policy: `"dense"`: all neurons; `"masked"`: the chosen ones, though all are
            computed; `"block"`: only the chosen ones are computed. See
            `gravity_hf.layers.sparsity_policy.sparsity`, which changes it for a while.
        exit_heads: whether there is a head that says when a token may leave.
        min_depth: layers that every token goes through.
        exit_threshold: of the head's probability; a token at or above it leaves. None: none does.
            See `fit_exit_threshold`.
        norm: `"rms"` or `"layer"`.
        position: `"rope"`, with `rope_parameters` as everywhere in transformers; or `"learned"`, a
            table, and no more tokens than `max_position_embeddings`.
        attention_bias: of q, k and v.
        attention_output_bias: of o.
        mlp_bias: of gate, up and down.
        qk_norm: an RMS norm over each head of q and k, before positions.
        sliding_window: a token sees so many, itself the last. Caches keep all of them.
        head_rank: of the language model's head, which then is not tied; 0: dense.
        dropout: on attention weights and on what the feed-forward network gives.
        initializer_range: of embeddings and a dense head. Other maps start as torch makes them,
            factorised ones with the same variance.
        screening_weight, gate_weight, exit_weight: of the losses that train the screening, the
            predictor and the exit head, in training only.
        screening_rows: queries of a sequence that the screening and the exit head learn from at
            each step; a sample.
        compat_reference: the published form: learned positions, layer norms, biases, an untied
            head of rank `attention_rank`, screening by maps of its own to `hidden_size / 4`, keys
            chosen one by one and for all heads alike, neurons one by one. It is causal, which
            published code is not. Implies those settings.

    Raises:
        ValueError: an unknown name, or two names of one setting with two values.
        StrictDataclassError: a value outside its range, of a wrong type, or that does not go with
            another.
    """

    model_type = "leanformer"
    keys_to_ignore_at_inference = [
        *("past_key_values", "cache", "aux_loss", "lm_loss", "screening_loss", "gate_loss"),
        *("exit_loss", "exit_layer", "statistics"),
    ]
    attribute_map = {
        "d_model": "hidden_size",
        "n_heads": "num_attention_heads",
        "n_kv_heads": "num_key_value_heads",
        "n_layers": "num_hidden_layers",
        "d_ff": "intermediate_size",
        "max_seq_len": "max_position_embeddings",
        "ff_rank": "feed_forward_rank",
        "ff_gate_rank": "gate_rank",
        "ff_sparsity_target": "feed_forward_sparsity",
        "screening_rank": "screen_dim",
    }

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    intermediate_size: int = 2048
    max_position_embeddings: int = 2048
    attention_rank: int = 64
    feed_forward_rank: int = 64
    rank_pattern: dict[str, int] | None = None
    hidden_act: str = "silu"
    attention: str = "dot_product"
    gravity_law: str = "power"
    gravity_softening: float | int | None = None
    learn_softening: bool = True
    gravity_strength: float | int = 3.5
    screening: str = "learned"
    screen_dim: int = 16
    attention_top_k: int = 64
    attention_block: int = 1
    local_window: int = 32
    sink_tokens: int = 4
    sparse_min_length: int = 0
    feed_forward_sparsity: float | int = 0.8
    feed_forward_block: int = 32
    gate_rank: int = 16
    feed_forward_policy: str = "dense"
    exit_heads: bool = True
    min_depth: int = 2
    exit_threshold: float | int | None = None
    norm: str = "rms"
    norm_eps: float = 1e-5
    position: str = "rope"
    rope_parameters: dict[str, Any] | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    tie_word_embeddings: bool = True
    head_rank: int = 0
    dropout: float | int = 0.0
    initializer_range: float | int = 0.02
    screening_weight: float | int = 0.1
    gate_weight: float | int = 0.01
    exit_weight: float | int = 0.01
    screening_rows: int = 64
    compat_reference: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.rank_pattern is None:
            self.rank_pattern = {}
        of_rope = {name: kwargs.pop(name) for name in _OF_ROPE if name in kwargs}
        super().__post_init__(**settle_names(self, kwargs), **of_rope)
        if self.compat_reference:
            self._become_compatible()
        if self.head_dim is None and self.num_attention_heads:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.position != "rope":
            self.rope_parameters = None

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> LeanFormerConfig:
        """`"tiny"`, `"demo"`, `"small"`, `"base"` (the published 39 M shape) or `"large"`.

        Raises:
            ValueError: an unknown name.
        """
        if name not in LEANFORMER_PRESETS:
            known = list(LEANFORMER_PRESETS)
            raise ValueError(f"LeanFormerConfig preset: expected one of {known}, got {name!r}")
        given = {cls.attribute_map.get(key, key): value for key, value in overrides.items()}
        return cls(**{**LEANFORMER_PRESETS[name], **given})

    @property
    def layer_types(self) -> list[str]:
        """Of every cache: it keeps all tokens, as a window is a matter of masks here."""
        return ["full_attention"] * self.num_hidden_layers

    @property
    def has_exits(self) -> bool:
        """Whether there is a layer before the last one that a token may leave after."""
        return self.exit_heads and self.min_depth < self.num_hidden_layers

    @property
    def softening_start(self) -> float:
        """`gravity_softening`, resolved."""
        if self.gravity_softening is None:
            return _SOFTNESS * (self.head_dim or 1)
        return float(self.gravity_softening)

    def rank_of(self, name: str, default: int) -> int:
        """The rank of the map of this name, such as `"layers.0.mlp.up_proj"` or `"lm_head"`."""
        pattern = self.rank_pattern or {}
        fitting = [x for x in pattern if fits_name(x, name)]
        return pattern[max(fitting, key=len)] if fitting else default

    def validate_architecture(self) -> None:
        """Called by `@strict` after construction."""
        check_leanformer_config(self, COMPAT_SETTINGS)

    def _become_compatible(self) -> None:
        """Only what was left as it is; what says otherwise is refused by the checks."""
        own = type(self)
        for name, value in COMPAT_SETTINGS.items():
            if getattr(self, name) == getattr(own, name):
                setattr(self, name, value)
        if not self.head_rank:
            self.head_rank = self.attention_rank


__all__ = ["LEANFORMER_PRESETS", "LeanFormerConfig"]
