"""Patches are cut and put together without loss, in the order that weights rely on."""

from __future__ import annotations

import pytest
import torch

from gravity_hf.models.geolip.patches import patchify, stitch


@pytest.mark.parametrize(("height", "width"), [(8, 8), (4, 12)], ids=["square", "rectangular"])
@pytest.mark.parametrize("channels", [1, 3, 5])
def test_stitch_is_the_exact_inverse(channels: int, height: int, width: int) -> None:
    images = torch.randn(2, channels, height, width)
    patches = patchify(images, 4)
    assert patches.shape == (2, height * width // 16, channels * 16)
    assert torch.equal(stitch(patches, 4, height, width), images)


def test_patches_go_row_by_row_with_channels_first_inside() -> None:
    images = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6)
    patches = patchify(images, 2)
    assert patches.shape == (1, 6, 8)
    # The second patch of the first row, and the first of the second row.
    assert patches[0, 1].tolist() == [2, 3, 8, 9, 26, 27, 32, 33]
    assert patches[0, 3].tolist() == [12, 13, 18, 19, 36, 37, 42, 43]


def test_no_images_are_no_patches() -> None:
    assert patchify(torch.zeros(0, 3, 4, 4), 2).shape == (0, 4, 12)
    assert stitch(torch.zeros(0, 4, 12), 2, 4, 4).shape == (0, 3, 4, 4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: patchify(torch.zeros(1, 3, 6, 8), 4), "height: expected a multiple"),
        (lambda: patchify(torch.zeros(1, 3, 8, 2), 4), "width: expected a multiple"),
        (lambda: patchify(torch.zeros(3, 8, 8), 4), "one image is pixel_values"),
        (lambda: stitch(torch.zeros(1, 3, 48), 4, 8, 8), r"\[B, 4, C \* 16\]"),
        (lambda: stitch(torch.zeros(1, 4, 40), 4, 8, 8), "pass the patch_size"),
        (lambda: patchify(torch.zeros(1, 3, 8, 8), 0), "an integer >= 1"),
    ],
    ids=["height", "width", "one-image", "count", "channels", "patch-size"],
)
def test_what_does_not_divide_is_an_error(call: object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()  # type: ignore[operator]
