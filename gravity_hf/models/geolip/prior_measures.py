"""How near a set of generated images comes to a set of real ones, and whether it is copied."""

from __future__ import annotations

import torch
from torch import Tensor

# Added to the power of each frequency before the logarithm: what is weaker counts as absent.
_POWER_FLOOR = 1e-3


def compare_images(
    images: Tensor, training: Tensor, held_out: Tensor, *, projections: int = 256, seed: int = 0
) -> dict[str, float]:
    """What tells `images` from `training`; held-out images, measured alike, are the floor.

    Args:
        images: `[S, C, H, W]`.
        training: `[M, C, H, W]`, M >= S; distances between sets take the first S of them, nearest
            neighbours are looked for in all.
        held_out: `[K, C, H, W]`, real images that were not trained on.
        projections, seed: see `sliced_wasserstein`.

    Returns:
        pixel_distance: sliced Wasserstein distance of the pixels. spectrum_distance: of the
        logarithms of power spectra. nearest_training: median root mean square distance per pixel
        to the nearest training image. nearest_ratio: that over the same of the held-out images.
        nearer_than_held_out: how often an image is nearer to a training image than a held-out one
        is, ties half: 0.5 where they are alike, near 1 for copies.
    """
    if len(training) < len(images):
        raise ValueError(
            f"compare_images.training: expected at least {len(images)} images, as many as are "
            f"compared with them, got {len(training)}"
        )
    peers = training[: len(images)]
    own, others = nearest_distances(images, training), nearest_distances(held_out, training)
    spectra = (log_power_spectrum(x).flatten(1) for x in (images, peers))
    pixels = (x.flatten(1) for x in (images, peers))
    return {
        "pixel_distance": sliced_wasserstein(*pixels, projections=projections, seed=seed),
        "spectrum_distance": sliced_wasserstein(*spectra, projections=projections, seed=seed),
        "nearest_training": own.median().item(),
        "nearest_ratio": (own.median() / others.median()).item(),
        "nearer_than_held_out": share_below(own, others),
    }


def sliced_wasserstein(a: Tensor, b: Tensor, *, projections: int = 256, seed: int = 0) -> float:
    """Mean Wasserstein-1 distance of two sets of points along random directions.

    Args:
        a, b: `[S, F]`, as many points in both; float64 inside.
        projections: unit directions, drawn on the CPU from `seed`.
    """
    if a.shape != b.shape or a.dim() != 2:
        raise ValueError(
            f"sliced_wasserstein: expected two sets [S, F] of one shape, got {list(a.shape)} and "
            f"{list(b.shape)}. Take as many points of both"
        )
    generator = torch.Generator("cpu").manual_seed(seed)
    directions = torch.randn(a.shape[1], projections, generator=generator, dtype=torch.float64)
    directions = (directions / directions.norm(dim=0)).to(a.device)
    along_a, along_b = ((x.double() @ directions).sort(dim=0).values for x in (a, b))
    return (along_a - along_b).abs().mean().item()


def log_power_spectrum(images: Tensor) -> Tensor:
    """`[S, H, W // 2 + 1]`: natural logarithm of the power at each frequency, mean of channels.

    Power is the squared magnitude of the Fourier transform over the number of pixels, in squared
    units of the images; 1e-3 is added first.
    """
    power = torch.fft.rfft2(images.double(), norm="ortho").abs().square().mean(dim=1)
    return (power + _POWER_FLOOR).log()


def nearest_distances(images: Tensor, others: Tensor) -> Tensor:
    """`[S]`: root mean square distance per pixel of each image to the nearest of the others."""
    a, b = (x.flatten(1).double() for x in (images, others.to(images.device)))
    return torch.cdist(a, b).min(dim=1).values / a.shape[1] ** 0.5


def share_below(a: Tensor, b: Tensor) -> float:
    """How often a value of `a` lies below one of `b`, over all pairs, ties half."""
    return ((a[:, None] < b).double() + 0.5 * (a[:, None] == b).double()).mean().item()


__all__ = [
    "compare_images",
    "log_power_spectrum",
    "nearest_distances",
    "share_below",
    "sliced_wasserstein",
]
