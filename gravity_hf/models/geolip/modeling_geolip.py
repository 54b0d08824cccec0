"""The geolip as a transformers model: encoder, lens, spectral layers, decoder."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.utils import can_return_tuple

from ...ops.reference import compute_dtype
from ..implementations import implementation_of
from . import patches as patching
from .address import Address, address_of, seeded_codebook
from .coders import BoundarySmooth, FrameDecoder, FrameEncoder
from .configuration_geolip import GeolipConfig
from .frames import angle_baseline, mean_angle, rigidity_barrier
from .inputs import GeolipOutput, check_images, check_patches
from .lens import Lens
from .losses import masked_mean, mean_cosine, reconstruction_loss
from .pretrained_geolip import GeolipPreTrainedModel
from .spectral import SpectralStack, Visible, omega_of
from .sterilising import FeatureSpace
from .verdict import Verdict, compute_verdict

# The codebook is drawn by the lens's seed plus this.
_CODEBOOK_SEED = 7


class GeolipModel(FeatureSpace, GeolipPreTrainedModel):
    """Reconstructs patches, or a host's features, from frames whose spectra attend.

    State: `encoder.{proj_in, blocks.{i}.{norm, fc1, fc2}, proj_out}.*`; `lens.basis` `[D, d]`;
    `spectral.layers.{i}.*`, see `SpectralLayer`; `decoder.*` as the encoder; `stem_decoder.*` with
    stem_detach; `smooth.{conv1, conv2}.*` with boundary_smooth; `codebook` `[K, d]`;
    `feature_mean`, `feature_std` `[P]`; `feature_whitening`, `feature_unwhitening` `[P, P]` with
    feature_norm "whiten".

    Raises:
        ValueError: a config without patch_dim.
    """

    _labels_are_inputs = False

    def __init__(self, config: GeolipConfig) -> None:
        super().__init__(config)
        width = config.patch_dim
        if width is None:
            raise ValueError(
                "GeolipConfig.patch_dim: expected the width of what is reconstructed, got None. "
                "Set patch_dim to the width of a host's features, or patch_size for images"
            )
        self.feature_norm = config.feature_norm
        self._angle_baseline = angle_baseline(config.base_dim, config.deviation_baseline)
        self.encoder = FrameEncoder(config, width)
        self.lens = Lens(config)
        self.spectral = SpectralStack(config)
        self.decoder = FrameDecoder(config, config.lens_dim, width, config.decoder_width)
        self.stem_decoder = None
        if config.stem_detach:
            self.stem_decoder = FrameDecoder(config, config.base_dim, width, config.hidden_size)
        smooths = config.boundary_smooth
        self.smooth = BoundarySmooth(config.num_channels, config.smooth_mid) if smooths else None
        for name, value in self.initial_buffers().items():
            self.register_buffer(name, value)
        self.gradient_checkpointing = False
        self.post_init()

    def initial_buffers(self) -> dict[str, Tensor]:
        config, width = self.config, self.config.patch_dim
        kind = {"dtype": torch.float32, "device": "cpu"}
        seed = config.lens_seed + _CODEBOOK_SEED
        buffers = {
            "codebook": seeded_codebook(config.codebook_size, config.base_dim, seed),
            "feature_mean": torch.zeros(width, **kind),
            "feature_std": torch.ones(width, **kind),
        }
        if config.feature_norm == "whiten":
            for name in ("feature_whitening", "feature_unwhitening"):
                buffers[name] = torch.eye(width, **kind)
        return buffers

    @can_return_tuple
    def forward(
        self,
        patches: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_frames: bool = False,
    ) -> GeolipOutput:
        """A reconstruction of patches or images.

        Args:
            patches: `[B, N, P]`, or else
            pixel_values: `[B, C, H, W]`, H and W multiples of patch_size.
            attention_mask: `[B, N]`, 0 for tokens that are none. Nobody attends to them; they get
                outputs, and count in no mean.
            labels: what to reconstruct, in the form of the input: the clean image of a noisy one.
                None: no loss, and `recon_cosine` is measured against the input; in
                `GeolipForReconstruction` the input.
            output_frames: also return frame and lens_frame.

        Raises:
            ValueError: inputs that do not fit.
        """
        if (patches is None) == (pixel_values is None):
            raise ValueError("GeolipModel: expected exactly one of patches and pixel_values")
        if pixel_values is None:
            return self.forward_patches(patches, attention_mask, labels, output_frames)
        check_images("pixel_values", pixel_values, self.config.num_channels)
        if labels is not None:
            check_images("labels", labels, self.config.num_channels)
            labels = self.patchify(labels)
        size = (pixel_values.shape[2], pixel_values.shape[3])
        return self._run(self.patchify(pixel_values), attention_mask, labels, output_frames, size)

    def forward_patches(
        self,
        patches: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_frames: bool = False,
        swap_context: bool = False,
    ) -> GeolipOutput:
        """As `forward`, for patches `[B, N, P]`.

        Args:
            swap_context: every spectral layer takes the keys and values of all other tokens from
                the next sample of the batch, and of the token itself from its own: what a token
                attends to has the statistics it had, and no relevance.

        Raises:
            ValueError: inputs that do not fit, or one sample only to swap.
        """
        return self._run(patches, attention_mask, labels, output_frames, None, swap_context)

    def encode(self, patches: Tensor) -> Tensor:
        """Frames `[B, N, V, d]`, at least float32, of patches `[B, N, P]`."""
        return self.encoder(self.normalize_features(patches))

    def attend(
        self, frame: Tensor, attention_mask: Tensor | None = None, swap_context: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Omega `[B, N, D]` before and after the spectral layers, of frames `[B, N, V, d]`."""
        omega = omega_of(self.lens(frame))
        return omega, self._attend(omega, attention_mask, swap_context)[0]

    def decode(self, frame: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """`[B, N, P]`, in the space of the input and at least float32, of frames `[B, N, V, d]`."""
        lens_frame = self.lens(frame)
        attended, _ = self._attend(omega_of(lens_frame), attention_mask, False)
        return self.restore_features(self.decoder(lens_frame, attended))

    def get_omega(self, patches: Tensor) -> Tensor:
        """`[B, N, D]`, before the spectral layers, of patches `[B, N, P]`."""
        return omega_of(self.lens(self.encode(patches)))

    def address(self, patches: Tensor) -> Address:
        """Which axes of the codebook the rows of the frames of patches `[B, N, P]` lie near."""
        return address_of(self.encode(patches), self.codebook, self.config.address_temperature)

    def alphas(self) -> Tensor:
        """`[L, D]`, float32, without gradients; `[0, D]` without spectral layers."""
        return self.spectral.alphas()

    def patchify(self, pixel_values: Tensor) -> Tensor:
        """Patches `[B, N, C p p]` of images `[B, C, H, W]`."""
        return patching.patchify(pixel_values, self._patch_size())

    def stitch(self, patches: Tensor, height: int, width: int) -> Tensor:
        """Images `[B, C, H, W]` of patches `[B, N, C p p]`, through boundary_smooth if there is
        one."""
        images = patching.stitch(patches, self._patch_size(), height, width)
        return images if self.smooth is None else self.smooth(images).to(patches.dtype)

    def verdict(self, batches: Iterable[dict[str, Any]], **options: Any) -> Verdict:
        """What can be measured of the model on batches; see `compute_verdict`."""
        return compute_verdict(self, batches, **options)

    def _run(
        self,
        patches: Tensor,
        attention_mask: Tensor | None,
        labels: Tensor | None,
        output_frames: bool,
        size: tuple[int, int] | None,
        swap_context: bool = False,
    ) -> GeolipOutput:
        if labels is None and self._labels_are_inputs:
            labels = patches
        check_patches(patches, attention_mask, labels, self.config.patch_dim)
        counted = None if attention_mask is None else attention_mask != 0
        normalized = self.normalize_features(patches)
        frame = self.encoder(normalized)
        lens_frame = self.lens(frame if self.stem_decoder is None else frame.detach())
        omega = omega_of(lens_frame)
        attended, mean_alpha = self._attend(omega, attention_mask, swap_context)
        found = self.decoder(lens_frame, attended)
        found = found.to(compute_dtype(found.dtype))
        restored, pixels = self.restore_features(found), None
        if size is not None:
            pixels = self.stitch(restored, *size)
            if self.smooth is not None:
                restored = self.patchify(pixels)
                found = self.normalize_features(restored)
        target = normalized if labels is None else self.normalize_features(labels)
        loss = None
        if labels is not None:
            loss = reconstruction_loss(found, target, counted, self.config.reconstruction_loss)
        deviation = None
        has_barrier = loss is not None and bool(self.config.rigidity_weight)
        if output_frames or not self.training or has_barrier:
            angle = mean_angle(frame if has_barrier else frame.detach())
            deviation = angle - self._angle_baseline
        if loss is not None:
            loss = loss + self._stem_loss(frame, target, counted)
            loss = loss + self._barrier(deviation, counted)
        return GeolipOutput(
            loss=loss,
            reconstruction=restored.to(patches.dtype),
            omega=omega,
            omega_attended=attended,
            frame=frame if output_frames else None,
            lens_frame=lens_frame if output_frames else None,
            recon_cosine=mean_cosine(found.detach(), target.detach(), counted),
            mean_alpha=mean_alpha,
            frame_deviation=None if deviation is None else masked_mean(deviation.detach(), counted),
            pixel_reconstruction=None if pixels is None else pixels.to(patches.dtype),
        )

    def _attend(
        self, omega: Tensor, attention_mask: Tensor | None, swap_context: bool
    ) -> tuple[Tensor, Tensor | None]:
        config = self.config
        if swap_context and omega.shape[0] < 2:
            raise ValueError(
                "swap_context: expected a batch of 2 samples or more, the next of which each takes "
                f"its context from, got {omega.shape[0]}"
            )
        visible = Visible.of(attention_mask, omega, causal=config.is_causal, swapped=swap_context)
        has_gravity = config.spectral_attention == "gravity"
        implementation = implementation_of(config, "a geolip") if has_gravity else "auto"
        return self.spectral(omega, visible, implementation)

    def _stem_loss(self, frame: Tensor, target: Tensor, counted: Tensor | None) -> Tensor | float:
        if self.stem_decoder is None:
            return 0.0
        found = self.stem_decoder(frame)
        kind = self.config.reconstruction_loss
        return reconstruction_loss(found.to(target.dtype), target, counted, kind)

    def _barrier(self, deviation: Tensor | None, counted: Tensor | None) -> Tensor | float:
        config = self.config
        if not config.rigidity_weight or deviation is None:
            return 0.0
        barrier = rigidity_barrier(
            deviation,
            config.base_dim,
            coefficient=config.envelope_coeff,
            margin=config.rigidity_margin,
            mask=counted,
        )
        return config.rigidity_weight * barrier.float()

    def _patch_size(self) -> int:
        size = self.config.patch_size
        if size is None:
            raise ValueError(
                "GeolipModel: expected a model of images, got one whose config has no patch_size. "
                "Give it patches"
            )
        return size


class GeolipForReconstruction(GeolipModel):
    """A geolip that always has a loss: where no labels are given it reconstructs its input.

    Trainer reports an `eval_loss` of batches with labels only; `GeolipCollator` writes them always.
    """

    _labels_are_inputs = True
