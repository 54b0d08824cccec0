"""Images of every kind as arrays with channels first, and pixel values as bytes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers.image_utils import (
    ChannelDimension,
    infer_channel_dimension_format,
    is_pil_image,
)

_WHITE = 255
# Of PIL: numbers that are no bytes, which a conversion to RGB would clip.
_WIDE_MODES = ("I", "F")


def as_channels_first(image: Any, *, to_rgb: bool, layout: Any = None) -> np.ndarray:
    """One image, of PIL, numpy or torch, as an array `[C, H, W]`, its numbers as they were.

    With `to_rgb`, grey is repeated three times, and what is transparent lies on white.

    Args:
        layout: transformers' `"channels_first"` or `"channels_last"`; None: found from the shape.

    Raises:
        ValueError: no image, or with `to_rgb` another number of channels than 1 to 4.
    """
    if is_pil_image(image):
        array, layout = _from_pil(image), ChannelDimension.LAST
    elif isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        array = (image.float() if image.dtype == torch.bfloat16 else image).numpy()
    else:
        array = np.asarray(image)
    if array.ndim == 2:
        array, layout = array[None], ChannelDimension.FIRST
    if array.ndim != 3:
        raise ValueError(f"image: expected [C, H, W], [H, W, C] or [H, W], got shape {array.shape}")
    if layout is None:
        layout = _layout(array)
    if layout == ChannelDimension.LAST:
        array = np.moveaxis(array, -1, 0)
    return _rgb(array) if to_rgb else array


def check_range(array: np.ndarray, *, highest: int) -> None:
    """Raise ValueError unless all numbers are between 0 and `highest`, 255 or 1.

    Fractions below 1 are most likely images in [0, 1], which read as bytes are black.
    """
    low, high = float(array.min()), float(array.max())
    in_unit = not np.issubdtype(array.dtype, np.integer) and 0 < high <= 1
    if low < 0 or not high <= highest or (highest > 1 and in_unit):
        raise ValueError(
            f"image: expected numbers from 0 to {highest}, got {low:.4g} to {high:.4g}; pass "
            "bytes, or numbers from 0 to 1 with do_rescale=False"
        )


def to_bytes(image: torch.Tensor) -> np.ndarray:
    """Pixel values `[C, H, W]`, -1 to 1, as uint8 `[H, W, C]`; what lies outside is clipped."""
    values = (image.detach().float() * 127.5 + 127.5).round().clamp(0, 255)
    return values.permute(1, 2, 0).to(torch.uint8).cpu().numpy()


def _from_pil(image: Any) -> np.ndarray:
    if image.mode.split(";")[0] in _WIDE_MODES:
        raise ValueError(
            f"image: expected 8 bits for each channel, got mode {image.mode!r}; scale it to 0 to "
            "255 first, as an array"
        )
    if image.mode == "L":
        return np.asarray(image)[..., None]
    has_alpha = "A" in image.getbands() or "transparency" in image.info
    return np.asarray(image.convert("RGBA" if has_alpha else "RGB"))


def _layout(array: np.ndarray) -> ChannelDimension:
    # Likely numbers first: an image of four rows, channels last, has two candidates.
    for channels in (3, 1, 4, 2):
        if channels in (array.shape[0], array.shape[2]):
            return infer_channel_dimension_format(array, num_channels=channels)
    raise ValueError(f"image: expected 1 to 4 channels, first or last, got shape {array.shape}")


def _rgb(array: np.ndarray) -> np.ndarray:
    channels = len(array)
    if not 1 <= channels <= 4:
        raise ValueError(
            f"image: expected 1 to 4 channels (grey, RGB, each with alpha), got {channels}"
        )
    if channels in (2, 4):
        array = _on_white(array[:-1], array[-1:])
    return np.repeat(array, 3, axis=0) if len(array) == 1 else array


def _on_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    is_bytes = np.issubdtype(colour.dtype, np.integer) or float(max(colour.max(), alpha.max())) > 1
    white = _WHITE if is_bytes else 1
    opacity = alpha.astype(np.float64) / white
    mixed = opacity * colour + (1 - opacity) * white
    return mixed.round().astype(colour.dtype) if is_bytes else mixed.astype(colour.dtype)
