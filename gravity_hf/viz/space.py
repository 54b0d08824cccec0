"""Points in three dimensions, as far from each other as three dimensions allow."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mpl_toolkits.mplot3d import Axes3D

_NAMED = 6
# Free space beyond the outermost points, as a share of an axis.
_AROUND = 0.04
# An axis is at least this share of the longest: its ticks need room, however little varies.
_THINNEST = 0.3
# Share of the cloud's width that a name takes up.
_ROOM = 0.12


class Components(NamedTuple):
    """Three principal directions `[3, D]`, zeros where there are fewer, and the share of the
    variance along each `[3]`."""

    directions: Tensor
    explained: Tensor


def principal_components(centred: Tensor) -> Components:
    """Of points `[N, D]` whose mean is 0."""
    _, spread, directions = torch.linalg.svd(centred, full_matrices=False)
    # An axis may point either way: its largest part is positive, so that figures can be compared.
    directions = directions[:3]
    largest = directions.gather(-1, directions.abs().argmax(-1, keepdim=True))
    variance = spread.square()
    explained = variance[:3] / variance.sum().clamp(min=1e-300)
    missing = 3 - len(directions)
    return Components(
        torch.nn.functional.pad(directions * largest.sign(), (0, 0, 0, missing)),
        torch.nn.functional.pad(explained, (0, missing)),
    )


def limits_of(points: Tensor) -> Tensor:
    """Ends of three axes `[3, 2]` around points `[N, 3]`; the axes are to share one scale."""
    low, high = points.amin(0), points.amax(0)
    spans = high - low
    spans = spans.clamp(min=max(_THINNEST * float(spans.max()), 1e-6))
    reach = (0.5 + _AROUND) * spans
    middle = (low + high) / 2
    return torch.stack([middle - reach, middle + reach], -1)


def set_axes(axis: Axes3D, titles: Sequence[str], limits: Tensor) -> None:
    """Titles and ends; a distance is as long along one axis as along another."""
    for which, name in zip("xyz", titles, strict=True):
        getattr(axis, f"set_{which}label")(name, fontsize=9)
        axis.tick_params(axis=which, labelsize=7.5)
    axis.set(**dict(zip(("xlim", "ylim", "zlim"), limits.tolist(), strict=True)))
    axis.set_aspect("equal")
    axis.view_init(elev=22, azim=-58)


def write_names(
    axis: Axes3D, points: Tensor, weights: Tensor, names: Mapping[int, str], paper: str
) -> None:
    """Names beside the points `[N, 3]` of the largest `weights` `[N]` that are far enough from each
    other."""
    from matplotlib.patheffects import withStroke

    for index in _apart(points, weights):
        if index in names:
            text = axis.text(*points[index].tolist(), f"  {names[index]}", fontsize=8, zorder=9)
            text.set_parse_math(False)
            text.set_path_effects([withStroke(linewidth=2.5, foreground=paper)])


def _apart(points: Tensor, weights: Tensor) -> list[int]:
    """Those of the largest weights, without those whose names would cover an earlier one's."""
    reach = _ROOM * float((points.amax(0) - points.amin(0)).max())
    found: list[int] = []
    for index in weights.argsort(descending=True, stable=True).tolist():
        others = points[found] - points[index]
        if len(found) < _NAMED and bool((others.norm(dim=-1) > reach).all()):
            found.append(index)
    return found
