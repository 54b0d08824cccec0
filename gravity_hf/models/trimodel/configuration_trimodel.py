"""Settings of the tri-model."""

from __future__ import annotations

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig

from ...layers.fusion import STREAMS
from ..settings import by_field_names, settle_names

# As published: the world is the most curved, the environment pulls hardest.
DEFAULT_STREAMS: dict[str, dict[str, float]] = {
    "world": {"curvature": 0.25, "gravitational_constant": 1.0},
    "self": {"curvature": 0.15, "gravitational_constant": 0.8},
    "env": {"curvature": 0.10, "gravitational_constant": 1.2},
}
# What the three streams share, by the names of their own config.
_SHARED = (
    *("hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
    *("dim_position", "dropout", "ff_expansion", "position_type", "position_scale", "fractal_dim"),
    *("num_scales", "base_freq", "scale_factor", "learnable_residual", "event_horizon"),
    *("softening", "max_force", "force_cap", "force_law", "exclude_self", "value_projection"),
    *("is_causal", "G_layer_decay", "G_head_decay", "layer_norm_eps", "implementation"),
)
_OWN = ("model_type", "vocab_size")


@strict
class TriModelConfig(PreTrainedConfig):
    """Settings of three LGT streams and their fusion.

    `softening=0.0` with `mask_padding=False` is the published model, whose streams mix no tokens:
    only the fusion does. The published names `dim_model`, `num_layers`, `num_heads`, `max_seq_len`
    and `use_fractal_positions` are accepted, too.

    Args:
        vocab_size: of all three streams, which share one embedding; None: continuous inputs.
        hidden_size: width `d` of every stream.
        output_dim: width of the output; None: `hidden_size`.
        streams: settings of `"world"`, `"self"` and `"env"` that differ from those shared, by the
            names of `LGTConfig`; what is left out is as published (`DEFAULT_STREAMS`).
        fusion_gravitational_constant: initial `G` of the fusion.
        use_gate: streams keep their own content: `CrossGravitationalFusion`.
        mask_padding: where streams differ in length, the shorter ones end; False: they are filled
            up with zeros that are attended to and counted, as published.
        is_causal: inside the streams, a token sees what stands before it. The fusion shows every
            stream the whole of the two others either way.
        softening, curvature and all other settings: as in `LGTConfig`, for every stream.

    Raises:
        ValueError: an unknown name or stream, or two names of one setting with two values.
        StrictDataclassError: a value outside its range, an unknown setting of a stream, or a wrong
            type.
    """

    model_type = "lgt_tri"
    keys_to_ignore_at_inference = [
        *("world_hidden_state", "self_hidden_state", "env_hidden_state"),
        *("stream_masses", "fusion_G", "diagnostics", "past_key_values", "cache"),
    ]
    attribute_map = {
        "dim_model": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "max_seq_len": "max_position_embeddings",
        "hidden_dropout_prob": "dropout",
    }

    vocab_size: int | None = None
    hidden_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    max_position_embeddings: int = 512
    dim_position: int = 64
    output_dim: int | None = None
    streams: dict[str, Any] | None = None
    fusion_gravitational_constant: float | int = 1.0
    use_gate: bool = False
    mask_padding: bool = True
    is_causal: bool = False
    use_cache: bool = True
    dropout: float | int = 0.1
    ff_expansion: float | int = 2.0
    position_type: str = "curved"
    position_scale: float | int | None = None
    fractal_dim: float | int = 1.5
    num_scales: int = 4
    base_freq: float | int = 1.0
    scale_factor: float | int = 2.0
    learnable_residual: bool = True
    event_horizon: float | int = 1e-6
    softening: float | int = 0.2
    max_force: float | int | None = 50.0
    force_cap: str = "clamp"
    force_law: str = "exp"
    exclude_self: bool = False
    value_projection: bool = False
    G_layer_decay: float | int = 0.9
    G_head_decay: float | int = 0.9
    layer_norm_eps: float = 1e-5
    tie_word_embeddings: bool = False
    implementation: str = "auto"
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        left = settle_names(self, kwargs)
        self.streams = _filled(self.streams, self.attribute_map)
        super().__post_init__(**left)

    @property
    def output_width(self) -> int:
        return self.output_dim or self.hidden_size

    def stream_config(self, name: str) -> PreTrainedConfig:
        """The `LGTConfig` of a stream, without a vocabulary of its own."""
        shared = {key: getattr(self, key) for key in _SHARED}
        # Only the language model generates, and it asks for a cache.
        own = {**shared, **(self.streams or {})[name]}
        return AutoConfig.for_model("lgt", vocab_size=None, use_cache=False, **own)

    def validate_architecture(self) -> None:
        """Called by `@strict` after construction."""
        for name in ("vocab_size", "output_dim"):
            value = getattr(self, name)
            _expect(value is None or value >= 1, name, "an integer >= 1, or None", value)
        constant = self.fusion_gravitational_constant
        finite = math.isfinite(constant)
        _expect(finite, "fusion_gravitational_constant", "a finite number", constant)
        for name, own in (self.streams or {}).items():
            known = AutoConfig.for_model("lgt").to_dict().keys() - set(_OWN)
            unknown = sorted(set(own) - known)
            _expect(not unknown, f"streams[{name!r}]", "settings of LGTConfig", unknown)
            widths = {"hidden_size": self.hidden_size, "vocab_size": None}
            for key, value in widths.items():
                _expect(own.get(key, value) == value, f"streams[{name!r}]", f"{key} {value}", own)
            self.stream_config(name)


def _filled(streams: Any, aliases: dict[str, str]) -> dict[str, Any]:
    """`streams`, by the names of fields, with what is published where nothing is said."""
    given = streams or {}
    fits = isinstance(given, dict) and all(isinstance(x, dict) for x in given.values())
    _expect(fits, "streams", "a dict of settings for each stream", streams)
    unknown = sorted(set(given) - set(STREAMS))
    _expect(not unknown, "streams", f"only {list(STREAMS)}", unknown)
    return {
        name: {**DEFAULT_STREAMS[name], **by_field_names(given.get(name, {}), aliases)}
        for name in STREAMS
    }


def _expect(condition: bool, name: str, expected: str, got: object) -> None:
    if not condition:
        raise ValueError(f"TriModelConfig.{name}: expected {expected}, got {got!r}")


__all__ = ["DEFAULT_STREAMS", "TriModelConfig"]
