"""What goes into a geolip, checked before anything is computed, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from transformers.utils import ModelOutput


@dataclass
class GeolipOutput(ModelOutput):
    """What a geolip gives.

    loss: where there are labels, or in `GeolipForReconstruction`. reconstruction: `[B, N, P]`, in
    the space of the input. omega, omega_attended: `[B, N, D]`, before and after the spectral
    layers. frame `[B, N, V, d]`, lens_frame `[B, N, V, D]`: where output_frames asks for them.
    recon_cosine: mean over valid tokens, in the normalised space, without gradient. mean_alpha: of
    all modes and layers; None without spectral layers. frame_deviation: mean over valid tokens, in
    radians; in training only where output_frames or the barrier needs it. pixel_reconstruction:
    `[B, C, H, W]`, of pixel_values.
    """

    loss: Tensor | None = None
    reconstruction: Tensor | None = None
    omega: Tensor | None = None
    omega_attended: Tensor | None = None
    frame: Tensor | None = None
    lens_frame: Tensor | None = None
    recon_cosine: Tensor | None = None
    mean_alpha: Tensor | None = None
    frame_deviation: Tensor | None = None
    pixel_reconstruction: Tensor | None = None


def check_images(name: str, images: Tensor, channels: int) -> None:
    """ValueError where they are not floats `[B, channels, H, W]`."""
    if images.dim() != 4 or images.shape[1] != channels or not images.is_floating_point():
        raise ValueError(
            f"{name}: expected floats [B, {channels}, H, W], got {images.dtype} "
            f"{tuple(images.shape)}. GeolipImageProcessor makes them"
        )


def check_patches(
    patches: Tensor, attention_mask: Tensor | None, labels: Tensor | None, width: int
) -> None:
    """ValueError where patches are not floats `[B, N, width]`, or others do not go with them."""
    if patches.dim() != 3 or patches.shape[-1] != width or not patches.is_floating_point():
        raise ValueError(
            f"patches: expected floats [B, N, {width}], got {patches.dtype} "
            f"{tuple(patches.shape)}. A model of other features has another config.patch_dim"
        )
    if labels is not None and (labels.shape != patches.shape or not labels.is_floating_point()):
        raise ValueError(
            f"labels: expected floats in the form of the input, as patches {tuple(patches.shape)}, "
            f"got {labels.dtype} {tuple(labels.shape)}. Leave them out to reconstruct the input"
        )
    if attention_mask is not None and attention_mask.shape != patches.shape[:2]:
        raise ValueError(
            f"attention_mask: expected {tuple(patches.shape[:2])}, one number for each token, got "
            f"{tuple(attention_mask.shape)}"
        )
