"""Images as rows of patches, and back."""

from __future__ import annotations

import torch


def patchify(pixel_values: torch.Tensor, patch_size: int) -> torch.Tensor:
    """The square patches of images, row by row; inside a patch channels come first.

    Args:
        pixel_values: `[B, C, H, W]`, any dtype and any number of channels.
        patch_size: `p`, in pixels; `H` and `W` are multiples of it.

    Returns:
        `[B, (H / p)(W / p), C p p]`, in the dtype of the images. `stitch` undoes it exactly.

    Raises:
        ValueError: not four dimensions, or a size that is no multiple of `patch_size`.
    """
    if pixel_values.ndim != 4:
        raise ValueError(
            f"patchify: expected pixel_values [B, C, H, W], got shape {tuple(pixel_values.shape)}; "
            "one image is pixel_values[None]"
        )
    batch, channels, height, width = pixel_values.shape
    rows, columns = patch_grid(height, width, patch_size)
    tiles = pixel_values.reshape(batch, channels, rows, patch_size, columns, patch_size)
    # [B, rows, columns, C, p, p]
    tiles = tiles.permute(0, 2, 4, 1, 3, 5)
    return tiles.reshape(batch, rows * columns, channels * patch_size**2)


def stitch(patches: torch.Tensor, patch_size: int, height: int, width: int) -> torch.Tensor:
    """The images `[B, C, H, W]` that `patchify` cut into `patches` `[B, N, C p p]`.

    Raises:
        ValueError: a size that is no multiple of `patch_size`, another number of patches than such
            images have, or a patch that is no whole number of channels.
    """
    rows, columns = patch_grid(height, width, patch_size)
    if patches.ndim != 3 or patches.shape[1] != rows * columns:
        raise ValueError(
            f"stitch: {height} x {width} pixels in patches of {patch_size} are [B, "
            f"{rows * columns}, C * {patch_size**2}], got shape {tuple(patches.shape)}"
        )
    channels, rest = divmod(patches.shape[2], patch_size**2)
    if rest or not channels:
        raise ValueError(
            f"stitch: expected patches of C * {patch_size}**2 = C * {patch_size**2} values, got "
            f"{patches.shape[2]}; pass the patch_size that they were cut with"
        )
    batch = patches.shape[0]
    tiles = patches.reshape(batch, rows, columns, channels, patch_size, patch_size)
    # [B, C, rows, p, columns, p]
    return tiles.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, height, width)


def patch_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """How many rows and columns of patches an image of so many pixels has.

    Raises:
        ValueError: a size that is no positive multiple of `patch_size`.
    """
    if patch_size < 1:
        raise ValueError(f"patch_size: expected an integer >= 1 (pixels), got {patch_size!r}")
    for name, pixels in (("height", height), ("width", width)):
        if pixels < patch_size or pixels % patch_size:
            raise ValueError(
                f"{name}: expected a multiple of patch_size ({patch_size}), got {pixels} pixels; "
                "resize the images, or choose another patch_size"
            )
    return height // patch_size, width // patch_size
