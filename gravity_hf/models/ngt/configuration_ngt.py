"""Settings of the Newton Gravity Transformer and of its twins."""

from __future__ import annotations

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..settings import settle_names
from .configuration_checks import GRAVITY_SETTINGS, check_ngt_config

# Of a new model's softening, in squared lengths of one head coordinate.
_SOFTNESS = 0.3125
# Of a new model's radius, in lengths of one head coordinate.
_REACH = 1.5

_PUBLISHED: dict[str, Any] = {
    "head_coord_dim": 16,
    "law": "force",
    "repulsive": True,
    "softening": 1e-6,
    "learn_softening": False,
    "initial_strength": math.log(2.0),
    "mass_exponent": False,
    "head_bias": True,
    "exclude_self": False,
    "coordinate_positions": "learned",
    "content_coordinates": False,
    "anchor_coordinates": False,
    "hidden_head_coordinates": False,
    "asymmetric": False,
    "symmetric_heads": 0,
    "mass_fading": 0.0,
    "coordinate_source": "attention",
    "cutoff": "hard",
    "initial_radius": 4.0,
}
# "v2" is what the class starts from. "reference" computes what published checkpoints do; "fixed" is
# the published design without its defects, so that it can be compared with.
NGT_PRESETS: dict[str, dict[str, Any]] = {
    "v2": {},
    "reference": {
        **_PUBLISHED,
        "evolve_last_layer": True,
        "crop_long_inputs": True,
        "initializer_range": 1.0,
    },
    "fixed": dict(_PUBLISHED),
}


@strict
class NGTConfig(PreTrainedConfig):
    """Settings of an NGT: tokens as particles, with a mass and with coordinates that move.

    Head h of a layer sees token j from token i at the squared distance `d2_ij = |c_i - c_j|^2` of
    their head coordinates, and weighs it `softmax_j(s_ij)`. With `g_h`, `e_h`, `mu_h`, `beta_h` of
    the head and masses `m > 0`,

        s_ij = -g_h ln(d2_ij + e_h) + mu_h ln(m_j + 1e-6) - l_h (t_i - t_j)     law "power"
        s_ij = (+-g_h / (d2_ij + e_h) + beta_h) m_i m_j        law "force", - where repulsive
        c_i  = Wc z_i + Wa p_i + bc + Wu LN1(h_i)              which of them: see below
        z'_i = LN(z_i + Wn a_i + Wh LN2(h_i))                  a: the layer's attention output

    The class starts from the preset `"v2"`. `"reference"` is the published model, to the digit;
    `"fixed"` is the same design without what can be mended in it; see `from_preset`.

    The published names are accepted, too: `num_tokens`, `hidden_dim`, `num_layers`, `num_heads`,
    `mlp_dim`, `max_seq_len`, and `hidden_dropout_prob` for `dropout`.

    Args:
        hidden_size: width `D`, a multiple of `num_attention_heads`.
        coord_dim: width `C` of a token's coordinates.
        head_coord_dim: width of what each head makes of them.
        max_position_embeddings: positions of a table; without a table longer inputs go on.
        dropout: on attention weights, and twice in the feed-forward network.
        attention: `"gravity"`, or `"dot_product"`: the twin, a vanilla transformer of the same
            shape. A twin has none of the settings from `law` to `cutoff_width`.
        positions: of a twin: `"learned"`, `"sinusoidal"`, `"alibi"` or `"none"`.
        law: `"power"` or `"force"`.
        repulsive: what is near is avoided, as published; force law only.
        softening: `e`, in units of squared distance. None: `0.3125 head_coord_dim`, three tenths
            of the mean squared distance in a new model.
        learn_softening: one per head, `softplus(.) + 1e-4`, starting at `softening`.
        initial_strength: `g = softplus(gamma)` at the start.
        token_masses: `m = softplus(E_mass[token])`; False: all masses are 1.
        mass_in_value: masses scale the values instead of entering scores.
        mass_exponent: `mu` is learned, starting at 1. Read where masses enter power-law scores.
        head_bias: `beta`; force law only.
        exclude_self: a token gives itself no weight, unless it sees no other.
        coordinate_positions: `p`: `"sinusoidal"` (computed, for any length), `"learned"` (a table
            that starts as N(0, 1)) or `"learned_sinusoidal"` (a table that starts as sinusoids).
        position_base: of the sinusoids: `p[t, 2k], p[t, 2k + 1]` are sine and cosine of
            `t base^(-2k / C)`.
        content_coordinates: `z0 = LN(p + Wcc LN(h0))`; False: `z0 = p`.
        anchor_coordinates: `Wa p_i` in every layer, so that place survives motion.
        hidden_head_coordinates: `Wu LN1(h_i)`.
        asymmetric: keys have maps to head coordinates of their own.
        shared_start: those start as copies of the queries' maps, so that a new model is symmetric:
            like tokens are near each other before anything is learned.
        symmetric_heads: of an asymmetric model, in how many heads, the last ones and at most half
            of all, keys have the queries' maps for good: there like tokens stay near each other,
            so that one is looked up by the other.
        mass_fading: the share of heads, in whole ones, the last, whose masses fade with age: `l_h`
            nats for each position `t`; learned, starting at `2^(-8 (h + 1) / H)`, the slopes of
            ALiBi. In the others `l_h` is 0. Power law only.
        coordinate_source: what moves coordinates: `"attention"`: `Wn a_i` alone; `"hidden"`: both,
            as above; `"pre_attention"`: `Wn LN1(h_i)`; `"none"`: `z` stays.
        evolve_last_layer: the last layer moves coordinates, too, though none reads them.
        cutoff: `"none"`, `"hard"`, `"log"`, or `"soft"`, which is published, hides nothing, and is
            of the force law; see `gravity_hf.ops.cutoff.Cutoff`. A token that a hard one leaves
            nothing, which with maps of their own for keys may be itself, too, gathers nothing.
        initial_radius: before softplus; one radius for the heads of a layer. None: `1.5
            sqrt(head_coord_dim)`, within which a new model has nearly all of its pairs.
        cutoff_width: of the hard and the logarithmic cutoff, in units of squared distance. Of the
            hard one it changes gradients alone: they reach what lies so near to the edge. Towards
            0 they are those of published models, whose radius has none.
        use_rsqrt: how published code computed a reciprocal. It changes nothing here, and is kept
            for whoever writes a published file again.
        crop_long_inputs: in evaluation, inputs that are too long lose their beginning, as
            published. False: they are an error where there is a table.
        initializer_range: of token embeddings and a twin's learned positions. Everything else
            starts as torch makes it.
        implementation: how attention is computed, as in `GravityConfig`.

    Raises:
        ValueError: an unknown name, or two names of one setting with two values.
        StrictDataclassError: a value outside its range, of a wrong type, or that does not go with
            another.
    """

    model_type = "ngt"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]
    attribute_map = {
        "num_tokens": "vocab_size",
        "hidden_dim": "hidden_size",
        "num_layers": "num_hidden_layers",
        "num_heads": "num_attention_heads",
        "mlp_dim": "intermediate_size",
        "max_seq_len": "max_position_embeddings",
        "hidden_dropout_prob": "dropout",
    }

    vocab_size: int = 8192
    hidden_size: int = 512
    coord_dim: int = 64
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    intermediate_size: int = 2048
    max_position_embeddings: int = 512
    head_coord_dim: int = 16
    dropout: float | int = 0.1
    layer_norm_eps: float = 1e-5
    attention: str = "gravity"
    positions: str = "learned"
    law: str = "power"
    repulsive: bool = False
    softening: float | int | None = None
    learn_softening: bool = True
    initial_strength: float | int = 3.5
    token_masses: bool = True
    mass_in_value: bool = False
    mass_exponent: bool = True
    head_bias: bool = False
    exclude_self: bool = True
    coordinate_positions: str = "sinusoidal"
    position_base: float | int = 100.0
    content_coordinates: bool = True
    anchor_coordinates: bool = False
    hidden_head_coordinates: bool = True
    asymmetric: bool = True
    shared_start: bool = True
    symmetric_heads: int = 2
    mass_fading: float | int = 1.0
    coordinate_source: str = "attention"
    evolve_last_layer: bool = False
    cutoff: str = "none"
    initial_radius: float | int | None = None
    cutoff_width: float | int = 1.0
    use_rsqrt: bool = False
    crop_long_inputs: bool = False
    initializer_range: float | int = 0.02
    tie_word_embeddings: bool = True
    lm_head_bias: bool = True
    use_cache: bool = True
    implementation: str = "auto"
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.softening is None and not self.is_twin:
            self.softening = _SOFTNESS * self.head_coord_dim
        if self.initial_radius is None and not self.is_twin:
            self.initial_radius = _REACH * math.sqrt(self.head_coord_dim)
        super().__post_init__(**settle_names(self, kwargs))

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> NGTConfig:
        """`"v2"`, the default; `"reference"`, for published checkpoints; or `"fixed"`.

        `"fixed"` is the published design with what can be mended without changing it: a radius with
        a gradient (all presets have that), embeddings that start small, no weights that nothing
        reads: no bias per head beside `mass_in_value`, where it would cancel. Sizes are the class's
        own. Of a twin, a preset says how it starts and what becomes of inputs that are too long.

        Raises:
            ValueError: an unknown name.
        """
        if name not in NGT_PRESETS:
            raise ValueError(f"NGTConfig preset: expected one of {list(NGT_PRESETS)}, got {name!r}")
        settings = dict(NGT_PRESETS[name])
        if overrides.get("attention") == "dot_product":
            settings = {x: settings[x] for x in settings if x not in GRAVITY_SETTINGS}
        elif name == "fixed" and overrides.get("mass_in_value"):
            settings["head_bias"] = False
        return cls(**{**settings, **overrides})

    @property
    def is_twin(self) -> bool:
        """Whether attention is the dot product's."""
        return self.attention == "dot_product"

    @property
    def has_position_table(self) -> bool:
        """Whether positions are learned, so that there are no more than the table has."""
        if self.is_twin:
            return self.positions == "learned"
        return self.coordinate_positions != "sinusoidal"

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def fading_heads(self) -> int:
        """How many heads, the last ones, have masses that fade; see `mass_fading`."""
        return 0 if self.is_twin else round(self.mass_fading * self.num_attention_heads)

    @property
    def key_heads(self) -> int:
        """How many heads, the first ones, have keys with maps of their own; see
        `symmetric_heads`."""
        if self.is_twin or not self.asymmetric:
            return 0
        heads = self.num_attention_heads
        return heads - min(self.symmetric_heads, heads // 2)

    @property
    def has_mass_exponent(self) -> bool:
        """Whether heads learn the power of masses; see `mass_exponent`."""
        in_scores = self.token_masses and not self.mass_in_value
        return self.mass_exponent and in_scores and self.law == "power" and not self.is_twin

    def moves_coordinates(self, layer_idx: int) -> bool:
        """Whether a layer changes the coordinates."""
        if self.is_twin or self.coordinate_source == "none":
            return False
        return self.evolve_last_layer or layer_idx < self.num_hidden_layers - 1

    def validate_architecture(self) -> None:
        """Called by `@strict` after construction."""
        check_ngt_config(self)


__all__ = ["NGT_PRESETS", "NGTConfig"]
