"""Settings of a geolip: sizes of its frames, its lens, its spectral layers and its loss."""

from __future__ import annotations

import math
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig

from ..settings import settle_names
from .configuration_checks import check_geolip_config

# Of a new model's softening, in squared lengths of one coordinate of a head.
_SOFTNESS = 0.3125

# 128 rows of 4 have 384 degrees of freedom. Of 32 rows, which have 96, even the best linear code of
# 96 numbers keeps a cosine of 0.85 of the features of MiniLM.
GEOLIP_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {},
    "base": {"hidden_size": 256, "num_rows": 128},
    "wide": {"hidden_size": 256, "num_rows": 128, "lens_dim": 64},
}


@strict
class GeolipConfig(PreTrainedConfig):
    """Settings of a geolip: patches or feature tokens become frames, whose spectra attend.

    With `V` rows of `d` coordinates, a lens `E` of `D >= d` rows, and for each token x

        M = rows of Encoder(x), each of length 1           the frame, `[V, d]`
        M_lens = M E^T, E^T E = 1                          angles stay as they are, `[V, D]`
        S_j = |column j of M_lens|                         omega, `[D]`; the squares sum to V
        S <- S (1 + alpha tanh(Attention(LN(S))))          each spectral layer, across tokens
        x' = Decoder(M_lens S)                             row by row scaled, then flattened

    `alpha = max_alpha sigmoid(.)` is learned for each of the D modes. Neither patches nor features
    have positions: a permutation of tokens permutes what comes out.

    Args:
        patch_dim: `P`, width of a patch or of a host's features. None: of images,
            `num_channels patch_size^2`; a model needs one of them.
        num_rows: `V`.
        base_dim: `d`.
        lens_dim: `D`, a multiple of `num_attention_heads`. From `d (d + 1) / 2` on, omega says all
            that `M^T M` does; see `gram_from_omega`.
        hidden_size: width of the encoder.
        encoder_depth, decoder_depth: residual blocks.
        decoder_hidden_size: width of the decoder; None: `hidden_size`.
        block_norm: LayerNorm in those blocks.
        decoder_block_norm: in those of the decoder; None: as block_norm.
        frame_sign: `"signed"`; `"canon"`: the encoder turns every row so that its first coordinate
            that is not 0 is positive.
        use_spectral: False: no spectral layers, `S` stays.
        num_spectral_layers: how many.
        num_attention_heads: of each.
        max_alpha: what alpha stays below, in (0, 1).
        alpha_init: before the sigmoid.
        is_causal: a token sees itself and what stands before it.
        spectral_attention: `"dot_product"`, or `"gravity"`: by the distance between what the layer
            makes of the spectra. Only gravity has the settings from `gravity_law` to
            `gravity_strength`. Its maps of keys are drawn as those of queries are, not copied from
            them: copies attend to themselves first, and denoised worse (16 tokens of one value, 600
            steps, strengths 1 and 3.5, two seeds: a mean squared error higher by 1 to 4 %).
        gravity_law: `"power"` or `"force"`, as in `gravity_attention`.
        gravity_softening: at the start, in units of squared distance. None: `0.3125 D / heads`.
        learn_softening: one per head, `softplus(.) + 1e-4`.
        gravity_strength: at the start, of each head, `softplus(.)`.
        implementation: how gravity is computed, as in `GravityConfig`.
        lens_mode: `"fixed"`: drawn by `lens_seed`, never trained; `"learned"`: the orthonormal
            factor of a parameter that starts as the fixed lens.
        lens_seed: of the lens and of the codebook.
        lens_sign: `"signed"`; `"canon"`: lifted rows are turned as with `frame_sign`, so that the
            decoder does not learn their signs.
        stem_detach: the encoder learns from a decoder of its own, `stem_decoder`, which reads `M`,
            and from nothing behind the lens; both losses are added.
        image_size: of images that an image processor makes; others may be given. A multiple of
            patch_size.
        patch_size: `p`. None: there are no images.
        num_channels: of images.
        boundary_smooth: two convolutions over stitched images, added to them; 0 at the start.
        smooth_mid: channels between the two.
        feature_norm: what inputs go through first: `"zscore"`, `"whiten"` or `"none"`; see
            `GeolipModel.set_feature_statistics`.
        reconstruction_loss: `"mse"`, `"cosine"` (1 - cosine) or `"cosine_mse"` (their sum).
        rigidity_weight: of the barrier that holds the deviation of each frame within
            `rigidity_margin` of its envelope; see `gravity_hf.models.geolip.frames`.
        rigidity_margin: a share of the envelope.
        envelope_coeff: `kappa`: the envelope is `kappa sqrt(d)` on either side of 0.
        deviation_baseline: what deviations are measured from: `"exact"`, or `"mc4096"`, an estimate
            by 4096 directions, as published numbers have it.
        engage_alpha_ratio, engage_gain: what a verdict asks of mechanism "A"; see `Verdict`.
        alpha_lr_multiplier: how much faster alpha learns than weights, where `GeolipTrainer` or
            `fit` trains.
        codebook_size: axes of the codebook that `GeolipModel.address` reads.
        address_temperature: of its assignments.
        host_config: of the model that features are of: `name_or_path`, `layer` and the like.
        verdict: what was measured of this model, by `compute_verdict`.

    Raises:
        ValueError: an unknown name.
        StrictDataclassError: a value outside its range, of a wrong type, or that does not go with
            another.
    """

    model_type = "geolip"
    keys_to_ignore_at_inference = [
        *("omega", "omega_attended", "frame", "lens_frame", "recon_cosine", "mean_alpha"),
        *("frame_deviation", "pixel_reconstruction"),
    ]
    attribute_map = {"num_hidden_layers": "num_spectral_layers"}

    patch_dim: int | None = None
    num_rows: int = 32
    base_dim: int = 4
    lens_dim: int = 16
    hidden_size: int = 64
    encoder_depth: int = 1
    decoder_depth: int = 1
    decoder_hidden_size: int | None = None
    block_norm: bool = True
    decoder_block_norm: bool | None = None
    frame_sign: str = "signed"
    use_spectral: bool = True
    num_spectral_layers: int = 2
    num_attention_heads: int = 4
    max_alpha: float = 0.2
    alpha_init: float | int = -2.0
    is_causal: bool = False
    spectral_attention: str = "dot_product"
    gravity_law: str = "power"
    gravity_softening: float | int | None = None
    learn_softening: bool = True
    gravity_strength: float | int = 3.5
    implementation: str = "auto"
    lens_mode: str = "fixed"
    lens_seed: int = 0
    lens_sign: str = "signed"
    stem_detach: bool = False
    image_size: int | None = None
    patch_size: int | None = None
    num_channels: int = 3
    boundary_smooth: bool = False
    smooth_mid: int = 16
    feature_norm: str = "zscore"
    reconstruction_loss: str = "mse"
    rigidity_weight: float | int = 0.0
    rigidity_margin: float | int = 0.5
    envelope_coeff: float | int = 0.02
    deviation_baseline: str = "exact"
    engage_alpha_ratio: float | int = 1.10
    engage_gain: float | int = 0.01
    alpha_lr_multiplier: float | int = 1.0
    codebook_size: int = 64
    address_temperature: float | int = 0.1
    host_config: dict[str, Any] | None = None
    verdict: dict[str, Any] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.patch_dim is None and self.patch_size is not None:
            self.patch_dim = self.num_channels * self.patch_size**2
        super().__post_init__(**settle_names(self, kwargs))

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> GeolipConfig:
        """`"tiny"`, the class's own sizes; `"base"`, 128 rows; or `"wide"`, a lens of 64.

        Raises:
            ValueError: an unknown name.
        """
        if name not in GEOLIP_PRESETS:
            known = list(GEOLIP_PRESETS)
            raise ValueError(f"GeolipConfig preset: expected one of {known}, got {name!r}")
        return cls(**{**GEOLIP_PRESETS[name], **overrides})

    @property
    def decoder_width(self) -> int:
        return self.hidden_size if self.decoder_hidden_size is None else self.decoder_hidden_size

    @property
    def head_dim(self) -> int:
        """Of a spectral layer."""
        return self.lens_dim // self.num_attention_heads

    @property
    def softening_start(self) -> float:
        """`gravity_softening`, resolved."""
        if self.gravity_softening is None:
            return _SOFTNESS * self.head_dim
        return float(self.gravity_softening)

    @property
    def alpha_start(self) -> float:
        """What every alpha is in a new model: 0.0238406 by default."""
        return self.max_alpha / (1.0 + math.exp(-self.alpha_init))

    @property
    def has_images(self) -> bool:
        """Whether the model takes images: whether patch_size is set."""
        return self.patch_size is not None

    def validate_architecture(self) -> None:
        """Called by `@strict` after construction."""
        check_geolip_config(self)


__all__ = ["GEOLIP_PRESETS", "GeolipConfig"]
