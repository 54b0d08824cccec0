"""Frames: `V` unit rows in `d` dimensions, and how far they are from lying at random.

The angle between two rows is projective, `arccos|<a, b>|` in [0, pi / 2]: a row and its negative
are one direction. The deviation of a frame is the mean angle between its rows less the mean angle
between random directions: below 0 rows gather, above 0 they avoid each other. Angles are computed
in float64.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional as F

from ...layers.float32 import without_autocast

BASELINES = ("exact", "mc4096")

# Cosines stop so far below 1, where the slope of arccos is not finite.
_COSINE_MARGIN = 1e-12
_MONTE_CARLO_DIRECTIONS = 4096
# Pairs of rows that are looked at together: 32 MB.
_PAIRS = 1 << 22
# Of simplex volumes: rows and simplices that are looked at, and what counts as a volume.
_MOST_ROWS, _SIMPLICES, _POINTS = 512, 200, 5
_LEAST_VOLUME_SQ, _LEAST_SIMPLICES = 1e-20, 10
_LEAST_SINGULAR_VALUE = 1e-8


@functools.cache
def angle_baseline(d: int, kind: str = "exact") -> float:
    """`A(d)`: mean projective angle between two random directions in `d` dimensions, in radians.

    `"exact"`: the integral of `t sin^(d-2) t` over that of `sin^(d-2) t`, both over [0, pi / 2];
    pi / 4 + 1 / pi for d = 4. `"mc4096"`: the mean over the pairs of 4096 directions drawn in
    float32 with seed 0, which published deviations are measured from; 2.4e-4 lower for d = 4.

    Raises:
        ValueError: `d < 2`, or another kind.
    """
    if d < 2 or kind not in BASELINES:
        raise ValueError(
            f"angle_baseline: expected d >= 2 and one of {list(BASELINES)}, got {d!r} and {kind!r}"
        )
    if kind == "mc4096":
        return _monte_carlo_baseline(d)
    # By parts: I_n = (n - 1) / n I_(n-2) + 1 / n^2, and W_n = (n - 1) / n W_(n-2) below it.
    power = (d - 2) % 2
    angle, weight = (math.pi**2 / 8, math.pi / 2) if power == 0 else (1.0, 1.0)
    for n in range(power + 2, d - 1, 2):
        angle = (n - 1) / n * angle + 1 / n**2
        weight = (n - 1) / n * weight
    return angle / weight


def critical_deviation(d: int, coefficient: float = 0.02) -> float:
    """Half of the width of the envelope: `coefficient sqrt(d)`, in radians; 0.04 for d = 4."""
    return coefficient * math.sqrt(d)


def mean_angle(frame: Tensor) -> Tensor:
    """Mean projective angle between the rows of frames `[..., V, d]`, in radians: `[...]`, float64
    (float32 where the device has no float64). Without gradients a few frames are looked at at a
    time, as all pairs of rows of all frames are many."""
    count = frame.shape[-2]
    if frame.requires_grad or frame.dim() < 3 or torch.compiler.is_compiling():
        return _mean_angle(frame)
    parts = frame.flatten(0, -3).split(max(1, _PAIRS // count**2))
    return torch.cat([_mean_angle(part) for part in parts]).view(frame.shape[:-2])


def frame_deviation(
    frame: Tensor, baseline: str = "exact", *, base_dim: int | None = None
) -> Tensor:
    """Mean projective angle between the rows less that between random directions, in radians.

    Args:
        frame: `[..., V, d]`, rows of length 1.
        baseline: see `angle_baseline`.
        base_dim: of the baseline. None: `d`. A lifted frame has the angles of the frame that it was
            lifted from, and is measured from the baseline of that one.

    Returns:
        `[...]`, float64 (float32 where the device has no float64).
    """
    dim = frame.shape[-1] if base_dim is None else base_dim
    return mean_angle(frame) - angle_baseline(dim, baseline)


def rigidity_barrier(
    deviation: Tensor,
    d: int,
    *,
    coefficient: float = 0.02,
    margin: float = 0.5,
    mask: Tensor | None = None,
) -> Tensor:
    """Mean over frames of `relu(|deviation| - margin critical)^2`: 0 well within the envelope.

    Args:
        deviation: `[...]`, of `frame_deviation`.
        d: of the frames.
        coefficient, margin: the envelope, and the share of it that costs nothing.
        mask: bool `[...]`, frames that count.
    """
    excess = F.relu(deviation.abs() - margin * critical_deviation(d, coefficient)).square()
    if mask is None:
        return excess.mean()
    return (excess * mask).sum() / mask.sum().clamp(min=1)


def random_frames(shape: tuple[int, ...], d: int, generator: torch.Generator) -> Tensor:
    """Frames `[*shape, d]` whose rows are uniform on the sphere, float32 on the generator's device;
    the last of `shape` is the number of rows."""
    drawn = torch.randn(*shape, d, generator=generator, device=generator.device)
    return F.normalize(drawn.float(), dim=-1)


def canonical(rows: Tensor) -> Tensor:
    """Rows `[..., d]`, each turned so that its first coordinate beyond 1e-6 is positive."""
    first = (rows.abs() > 1e-6).to(torch.uint8).argmax(-1, keepdim=True)
    return torch.where(rows.gather(-1, first) < 0, -rows, rows)


def spectrum(frame: Tensor) -> Tensor:
    """Singular values of frames `[..., V, d]`, largest first: `[..., min(V, d)]`, float64."""
    return torch.linalg.svdvals(frame.double())


def effective_rank(singular_values: Tensor) -> Tensor:
    """`exp` of the entropy of singular values `[..., r]` over their sum: `[...]`, 1 to r."""
    values = singular_values.double().clamp(min=_LEAST_SINGULAR_VALUE)
    share = values / values.sum(-1, keepdim=True)
    return torch.exp(-(share * share.log()).sum(-1))


def simplex_volume_spread(frame: Tensor, seed: int = 0) -> float:
    """Standard deviation over mean of the volumes of 200 simplices of 5 rows, drawn by `seed`.

    A scale-free number of how evenly the rows `[V, d]` lie. Of more than 512 rows 512 are drawn
    from. Volumes are those of Cayley and Menger, from the determinant of the edges' Gram matrix;
    flat simplices are left out. 0 where there are less than 5 rows or 10 simplices.

    Raises:
        ValueError: not one frame.
    """
    if frame.dim() != 2:
        raise ValueError(f"frame: expected one frame [V, d], got {tuple(frame.shape)}")
    rows = frame.detach().double().cpu()
    generator = torch.Generator("cpu").manual_seed(seed)
    if rows.shape[0] > _MOST_ROWS:
        rows = rows[torch.randperm(rows.shape[0], generator=generator)[:_MOST_ROWS]]
    count = rows.shape[0]
    if count < _POINTS:
        return 0.0
    order = torch.rand(_SIMPLICES, count, generator=generator).argsort(-1)
    points = rows[order[:, :_POINTS]]
    edges = points[:, 1:] - points[:, :1]
    volume_sq = torch.linalg.det(edges @ edges.mT) / math.factorial(_POINTS - 1) ** 2
    volumes = volume_sq[volume_sq > _LEAST_VOLUME_SQ].sqrt()
    if volumes.numel() < _LEAST_SIMPLICES:
        return 0.0
    return float(volumes.std() / volumes.mean())


def _mean_angle(frame: Tensor) -> Tensor:
    # Apple's GPUs have no float64.
    rows = frame.float() if frame.device.type == "mps" else frame.double()
    with without_autocast(frame.device.type):
        cosines = (rows @ rows.mT).flatten(-2)
    count = frame.shape[-2]
    first, second = torch.triu_indices(count, count, 1, device=frame.device)
    cosines = cosines.index_select(-1, first * count + second).abs()
    return cosines.clamp(max=1.0 - _COSINE_MARGIN).acos().mean(-1)


@functools.cache
def _monte_carlo_baseline(d: int) -> float:
    generator = torch.Generator("cpu").manual_seed(0)
    count = _MONTE_CARLO_DIRECTIONS
    drawn = torch.randn(count, d, generator=generator, dtype=torch.float32, device="cpu")
    rows = F.normalize(drawn, dim=-1)
    total = 0.0
    # By bands, as all pairs at once take 67 MB.
    for start in range(0, count, 512):
        band = (rows[start : start + 512] @ rows.T).abs().clamp(max=1.0).acos()
        total += float(band.triu(start + 1).double().sum())
    return total / (count * (count - 1) / 2)
