"""Settings of the Lightweight Gravitational Transformer."""

from __future__ import annotations

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ...config import IMPLEMENTATIONS
from ..settings import settle_names

POSITION_TYPES = ("curved", "fractal")
FORCE_LAWS = ("exp", "power")
FORCE_CAPS = ("clamp", "tanh")

# The published sizes. `fractal_res` is published under that name without fractal positions.
LGT_PRESETS: dict[str, dict[str, Any]] = {
    "edge_150k": {
        "hidden_size": 64,
        "dim_position": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "curvature": 0.10,
    },
    "meta_probe": {
        "hidden_size": 128,
        "dim_position": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "curvature": 0.15,
    },
    "victorcos": {
        "hidden_size": 192,
        "dim_position": 96,
        "num_hidden_layers": 5,
        "num_attention_heads": 6,
        "curvature": 0.18,
    },
    "fractal_res": {
        "hidden_size": 256,
        "dim_position": 128,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "curvature": 0.25,
    },
}

# Fractal positions lie 20 to 76 apart (squared): at that scale no force is felt. With this length,
# over sqrt(dim_position), previous-token recall rises from 0.96 and 0.99 to 1.00.
_FRACTAL_LENGTH = 0.6


@strict
class LGTConfig(PreTrainedConfig):
    """Settings of an LGT: masses per token, forces between positions.

    A token i sees token j with the weight `softmax_j(min(|G| m_i m_j / D_ij, max_force))`, where
    `D = max(s (1 + curvature cos sqrt(s + event_horizon)), event_horizon) + softening` and `s` is
    the squared distance of their positions.

    `softening=0.0` is the published law. Attention is then the identity, because `D_ii` is 1e-6,
    and training cannot leave it; converted checkpoints keep it, so that they compute what they
    always did. The default, 0.2, mixes tokens.

    The published names are accepted, too: `dim_model`, `num_layers`, `num_heads`, `max_seq_len`,
    `tie_weights`, `use_fractal_positions`, and `hidden_dropout_prob` for `dropout`.

    Args:
        vocab_size: None for models of continuous inputs (`inputs_embeds`), without embedding.
        hidden_size: width `d`, a multiple of `num_attention_heads`.
        dim_position: coordinates of a position.
        max_position_embeddings: number of positions; longer inputs are refused.
        curvature: kappa of the distance, and the initial `curvature_scale` of curved positions.
        gravitational_constant: initial `G` of layer i, head k is this times
            `G_layer_decay**i * G_head_decay**k`.
        dropout: on the outputs of attention and feed-forward network, and inside the latter.
        position_type: `"curved"` (learned) or `"fractal"` (sines, with a learned residual).
        position_scale: factor of the positions before distances. None: 1, and for fractal positions
            of a softened model `0.6 / sqrt(dim_position)`.
        fractal_dim, num_scales, base_freq, scale_factor, learnable_residual: of fractal positions.
        ff_expansion: inner width of the feed-forward network over `hidden_size`.
        event_horizon: floor of the curved distance.
        softening: added to the distance; 0 is the published law.
        max_force: ceiling of the force, or None. Law `"exp"` only.
        force_cap: `"clamp"`, as published, or `"tanh"`, whose gradient never ends.
        force_law: `"exp"`: weights are `exp(force)`, as published; `"power"`: weights are
            proportional to `(m_j / D_ij)^|G|`.
        exclude_self: a token gives itself no weight, unless it sees no other.
        value_projection: values are a linear map of the hidden state instead of its head slices.
        is_causal: a token sees what stands before it. False is the published, bidirectional model.
        lm_head_bias: of the language model's head. None: unless it is tied.
        initializer_range: of the embedding of tied models; the rest starts as published.
        implementation: how attention is computed, as in `GravityConfig`.

    Raises:
        ValueError: an unknown name, or two names of one setting with two values.
        StrictDataclassError: a value outside its range, or of a wrong type.
    """

    model_type = "lgt"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {
        "dim_model": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "max_seq_len": "max_position_embeddings",
        "hidden_dropout_prob": "dropout",
        "tie_weights": "tie_word_embeddings",
    }

    vocab_size: int | None = 32000
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    max_position_embeddings: int = 512
    dim_position: int = 64
    curvature: float | int = 0.15
    gravitational_constant: float | int = 1.0
    G_layer_decay: float | int = 0.9
    G_head_decay: float | int = 0.9
    dropout: float | int = 0.1
    tie_word_embeddings: bool = False
    lm_head_bias: bool | None = None
    position_type: str = "curved"
    position_scale: float | int | None = None
    fractal_dim: float | int = 1.5
    num_scales: int = 4
    base_freq: float | int = 1.0
    scale_factor: float | int = 2.0
    learnable_residual: bool = True
    ff_expansion: float | int = 2.0
    event_horizon: float | int = 1e-6
    softening: float | int = 0.2
    max_force: float | int | None = 50.0
    force_cap: str = "clamp"
    force_law: str = "exp"
    exclude_self: bool = False
    value_projection: bool = False
    is_causal: bool = True
    use_cache: bool = True
    layer_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    implementation: str = "auto"
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**settle_names(self, kwargs))

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> LGTConfig:
        """One of the published sizes: `"edge_150k"`, `"meta_probe"`, `"victorcos"`,
        `"fractal_res"`.

        The vocabulary is 32000 unless given, as in the published builder; the parameter counts in
        the names hold for none of the usual vocabularies. `fractal_res` has curved positions, as
        published; ask for fractal ones with `position_type="fractal"`.

        Raises:
            ValueError: an unknown name.
        """
        if name not in LGT_PRESETS:
            raise ValueError(f"LGTConfig preset: expected one of {list(LGT_PRESETS)}, got {name!r}")
        return cls(**{**LGT_PRESETS[name], **overrides})

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def intermediate_size(self) -> int:
        return int(self.hidden_size * self.ff_expansion)

    @property
    def has_head_bias(self) -> bool:
        """Whether the language model's head has a bias."""
        return not self.tie_word_embeddings if self.lm_head_bias is None else self.lm_head_bias

    @property
    def length_unit(self) -> float:
        """The factor of the positions that is in force; see `position_scale`."""
        if self.position_scale is not None:
            return float(self.position_scale)
        if self.position_type == "fractal" and self.softening > 0:
            return _FRACTAL_LENGTH / math.sqrt(self.dim_position)
        return 1.0

    def validate_architecture(self) -> None:
        """Called by `@strict` after construction."""
        least = {"num_hidden_layers": 0, "hidden_size": 1, "num_attention_heads": 1}
        least |= {"max_position_embeddings": 1, "dim_position": 1, "num_scales": 1}
        for name, minimum in least.items():
            value = getattr(self, name)
            fits = isinstance(value, int) and value >= minimum
            _expect(fits, name, f"an integer >= {minimum}", value)
        vocabulary = self.vocab_size
        fits = vocabulary is None or (isinstance(vocabulary, int) and vocabulary >= 1)
        _expect(fits, "vocab_size", "an integer >= 1 or None", vocabulary)
        if self.hidden_size % self.num_attention_heads:
            expected = f"a multiple of num_attention_heads ({self.num_attention_heads})"
            _expect(False, "hidden_size", expected, self.hidden_size)
        signed = ("curvature", "gravitational_constant", "G_layer_decay", "G_head_decay")
        for name in (*signed, "fractal_dim"):
            value = getattr(self, name)
            _expect(_is_finite(value), name, "a finite number", value)
        for name in ("softening", "event_horizon", "initializer_range"):
            value = getattr(self, name)
            _expect(_is_finite(value) and value >= 0, name, "a finite number >= 0", value)
        for name in ("layer_norm_eps", "base_freq", "scale_factor"):
            value = getattr(self, name)
            _expect(_is_finite(value) and value > 0, name, "a finite number > 0", value)
        horizon = self.event_horizon > 0
        _expect(horizon, "event_horizon", "> 0: it is the floor of distances", self.event_horizon)
        fits = _is_finite(self.dropout) and 0 <= self.dropout < 1
        _expect(fits, "dropout", "a number in [0, 1)", self.dropout)
        fits = _is_finite(self.ff_expansion) and self.intermediate_size >= 1
        _expect(fits, "ff_expansion", "at least 1 / hidden_size", self.ff_expansion)
        for name in ("max_force", "position_scale"):
            value = getattr(self, name)
            fits = value is None or (_is_finite(value) and value > 0)
            _expect(fits, name, "a finite number > 0, or None", value)
        choices = {
            "position_type": POSITION_TYPES,
            "force_law": FORCE_LAWS,
            "force_cap": FORCE_CAPS,
            "implementation": IMPLEMENTATIONS,
        }
        for name, known in choices.items():
            value = getattr(self, name)
            _expect(value in known, name, f"one of {list(known)}", value)


def _is_finite(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and math.isfinite(value)


def _expect(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"LGTConfig.{name}: expected {expected}, got {got!r}")


__all__ = ["LGT_PRESETS", "LGTConfig"]
