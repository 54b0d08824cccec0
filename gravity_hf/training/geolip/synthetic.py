"""Images made by rules, by seed, in [-1, 1]: what is shared between their patches is known.

from gravity_hf.training.geolip.synthetic import add_noise, synthetic_images

clean = synthetic_images("shared_colour", 512)
noisy = add_noise(clean, 2.0, seed=1)
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["KINDS", "add_noise", "synthetic_images"]

# Soft edges are this many pixels wide.
_EDGE = 1.0
_WAVES = 4
_SHAPES = 3
# Numbers that one wave and one shape are made of.
_PER_WAVE, _PER_SHAPE = 6, 8


def synthetic_images(
    kind: str = "shapes", count: int = 512, size: int = 32, patch_size: int = 4, seed: int = 0
) -> Tensor:
    """RGB images of one kind; the first of them do not depend on how many there are.

    `waves`: a few plane waves, each with its colour. `shared_colour`: one colour all over.
    `independent_colour`: a colour of its own for each patch. `noise`: each number of its own.
    `shapes`: a few soft discs and rectangles before a gradient.

    Args:
        kind: one of these names.
        count: how many.
        size: height and width in pixels.
        patch_size: of the patches of `independent_colour`.
        seed: of all random numbers; torch's own are left alone.

    Returns:
        `[count, 3, size, size]` float32 in [-1, 1].

    Raises:
        ValueError: an unknown kind, a size below 1, or patches that do not tile the image.
    """
    if kind not in KINDS:
        raise ValueError(f"synthetic_images.kind: expected one of {list(KINDS)}, got {kind!r}")
    for name, value in (("count", count), ("size", size), ("patch_size", patch_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(
                f"synthetic_images.{name}: expected a whole number of at least 1, got {value!r}"
            )
    if size % patch_size:
        raise ValueError(
            f"synthetic_images.patch_size: expected a divisor of size {size}, got {patch_size}"
        )
    generator = torch.Generator().manual_seed(seed)
    return KINDS[kind](generator, count, size, patch_size)


def add_noise(images: Tensor, sigma: float, seed: int = 0) -> Tensor:
    """`images + sigma * normal noise`, of any shape, by seed; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(images.shape, generator=generator, dtype=torch.float32)
    return images + sigma * noise.to(images.device, images.dtype)


def _signed(generator: torch.Generator, *shape: int) -> Tensor:
    """Uniform in [-1, 1]."""
    return torch.rand(*shape, generator=generator) * 2 - 1


def _noise(generator: torch.Generator, count: int, size: int, patch_size: int) -> Tensor:
    return _signed(generator, count, 3, size, size)


def _shared_colour(generator: torch.Generator, count: int, size: int, patch_size: int) -> Tensor:
    return _signed(generator, count, 3, 1, 1).repeat(1, 1, size, size)


def _independent_colour(
    generator: torch.Generator, count: int, size: int, patch_size: int
) -> Tensor:
    grid = size // patch_size
    colours = _signed(generator, count, 3, grid, grid)
    return colours.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)


def _waves(generator: torch.Generator, count: int, size: int, patch_size: int) -> Tensor:
    numbers = torch.rand(count, _WAVES, _PER_WAVE, generator=generator)
    y, x = _grid(size)
    total = torch.zeros(count, 3, size, size)
    for wave in numbers.unbind(1):
        # One to four periods over the image, in any direction.
        periods = (1 + 3 * wave[:, 0]) * 2 * math.pi
        direction = wave[:, 1] * 2 * math.pi
        along = _scaled(torch.cos(direction), x) + _scaled(torch.sin(direction), y)
        values = torch.sin(periods.view(-1, 1, 1) * along + _scaled(wave[:, 2], 2 * math.pi))
        total += (wave[:, 3:] * 2 - 1)[:, :, None, None] * values[:, None]
    return total / _WAVES


def _shapes(generator: torch.Generator, count: int, size: int, patch_size: int) -> Tensor:
    background = _signed(generator, count, 3, 2)
    # A draw of its own for each, so that more images change none of the first.
    numbers = torch.rand(count, _SHAPES, _PER_SHAPE, generator=_next(generator))
    y, x = _grid(size)
    images = torch.lerp(
        background[:, :, 0, None, None], background[:, :, 1, None, None], y.expand(size, size)
    )
    for shape in numbers.unbind(1):
        down, across = y - shape[:, 0].view(-1, 1, 1), x - shape[:, 1].view(-1, 1, 1)
        height, width = (0.1 + 0.25 * shape[:, i].view(-1, 1, 1) for i in (2, 3))
        disc = height - torch.hypot(down, across)
        rectangle = torch.minimum(height - down.abs(), width - across.abs())
        inside = torch.where(shape[:, 4].view(-1, 1, 1) < 0.5, disc, rectangle)
        cover = torch.sigmoid(inside * size / _EDGE)[:, None]
        colour = (shape[:, 5:8] * 2 - 1)[:, :, None, None]
        images = torch.lerp(images, colour.expand_as(images), cover)
    return images


def _next(generator: torch.Generator) -> torch.Generator:
    """Another stream by the same seed, wherever `generator` has come to."""
    return torch.Generator().manual_seed(generator.initial_seed() + 0x5EED)


def _grid(size: int) -> tuple[Tensor, Tensor]:
    """Pixel centres from 0 to 1: `[size, 1]` and `[1, size]`."""
    line = (torch.arange(size) + 0.5) / size
    return line[:, None], line[None]


def _scaled(values: Tensor, by: Tensor | float) -> Tensor:
    """`values` `[count]` times `by`, as `[count, ., .]`."""
    return values.view(-1, 1, 1) * by


KINDS: dict[str, Callable[[torch.Generator, int, int, int], Tensor]] = {
    "shapes": _shapes,
    "waves": _waves,
    "shared_colour": _shared_colour,
    "independent_colour": _independent_colour,
    "noise": _noise,
}
