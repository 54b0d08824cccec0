"""Queries and keys of a head as points in space, as near to each other as the law takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .drawing import Drawing
from .recording import RecordedAttention
from .style import BLUE, ORANGE, Theme, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mpl_toolkits.mplot3d import Axes3D

_LARGEST, _SMALLEST = 420.0, 9.0
_NAMED = 6
# Free space beyond the outermost points, as a share of an axis.
_AROUND = 0.04
# An axis is at least this share of the longest: its ticks need room, however little varies.
_THINNEST = 0.3
# Share of the cloud's width that a name takes up.
_ROOM = 0.12


@dataclass(frozen=True, eq=False)
class HeadCloud:
    """Principal components of a head's queries and keys, taken together.

    `queries` `[Tq, 3]`, `keys` `[Tk, 3]`: coordinates whose squared distances come as near to the
    law's as three dimensions allow; with lifted keys the lifting coordinate counts. `explained`
    `[3]`: share of the variance along each. `received` `[Tk]`: attention that each key gets, summed
    over the queries; 1 is as much as one query gives.
    """

    queries: Tensor
    keys: Tensor
    explained: Tensor
    received: Tensor

    @property
    def areas(self) -> Tensor:
        """Marker areas of the keys, points squared: proportional to `received`, never invisible."""
        most = self.received.max().clamp(min=1e-12)
        return (_LARGEST * self.received / most).clamp(min=_SMALLEST)

    @property
    def limits(self) -> Tensor:
        """Ends of the three axes `[3, 2]`, all points within; the axes are to share one scale."""
        points = torch.cat([self.queries, self.keys])
        low, high = points.amin(0), points.amax(0)
        spans = high - low
        spans = spans.clamp(min=max(_THINNEST * float(spans.max()), 1e-6))
        reach = (0.5 + _AROUND) * spans
        middle = (low + high) / 2
        return torch.stack([middle - reach, middle + reach], -1)

    @property
    def axis_titles(self) -> list[str]:
        return [
            f"component {i + 1} ({100 * share:.0f} %)"
            for i, share in enumerate(self.explained.tolist())
        ]


def head_cloud(recorded: RecordedAttention, head: int) -> HeadCloud:
    """Three principal components of one head; where there are fewer, the rest is 0."""
    query, key = recorded.query[head].double(), recorded.key[head].double()
    if recorded.key_radius_sq is not None:
        # The coordinate that puts every key on the sphere and every query in its plane.
        rest = recorded.key_radius_sq[head].double() - key.square().sum(-1)
        key = torch.cat([key, rest.clamp(min=0.0).sqrt()[:, None]], -1)
        query = torch.cat([query, torch.zeros_like(query[:, :1])], -1)
    points = torch.cat([query, key])
    centred = points - points.mean(0)
    _, spread, directions = torch.linalg.svd(centred, full_matrices=False)
    # An axis may point either way: its largest part is positive, so that figures can be compared.
    directions = directions[:3]
    largest = directions.gather(-1, directions.abs().argmax(-1, keepdim=True))
    coordinates = centred @ (directions * largest.sign()).T
    missing = 3 - coordinates.shape[-1]
    coordinates = torch.nn.functional.pad(coordinates, (0, missing))
    variance = spread.square()
    explained = torch.nn.functional.pad(
        variance[:3] / variance.sum().clamp(min=1e-300), (0, missing)
    )
    count = query.shape[0]
    return HeadCloud(
        coordinates[:count], coordinates[count:], explained, recorded.received[head].double()
    )


def cloud_figure(cloud: HeadCloud, tokens: Sequence[str], title: str) -> Drawing:
    """Keys as discs whose area is the attention they get, queries as small triangles.

    Args:
        cloud: see `head_cloud`.
        tokens: one label per key; the keys with the most attention are named.
        title: above everything.
    """

    def build(theme: Theme) -> Figure:
        figure = new_figure(7.6, 6.4, title=title)
        axis: Axes3D = figure.add_subplot(projection="3d")
        # Names lie over the discs, not between them.
        axis.computed_zorder = False
        x, y, z = cloud.queries.T.numpy()
        axis.scatter(x, y, z, s=18, marker="^", c=ORANGE, alpha=1.0, linewidths=0, label="query")
        x, y, z = cloud.keys.T.numpy()
        most = float(cloud.received.max())
        label = f"key; area: attention received (most: {most:.1f} queries' worth)"
        axis.scatter(
            x,
            y,
            z,
            s=cloud.areas.numpy(),
            c=BLUE,
            alpha=0.85,
            edgecolors=theme.ink,
            linewidths=0.4,
            label=label,
        )
        _name_largest(axis, cloud, tokens, theme.paper)
        for which, name in zip("xyz", cloud.axis_titles, strict=True):
            getattr(axis, f"set_{which}label")(name, fontsize=9)
            axis.tick_params(axis=which, labelsize=7.5)
        axis.set(**dict(zip(("xlim", "ylim", "zlim"), cloud.limits.tolist(), strict=True)))
        # A distance is as long along one axis as along another.
        axis.set_aspect("equal")
        axis.view_init(elev=22, azim=-58)
        legend = axis.legend(loc="upper left", fontsize=8.5)
        # Their real sizes say nothing in a legend.
        for handle in legend.legend_handles:
            handle.set_sizes([36.0])
        return figure

    return Drawing("queries-and-keys", title, "", build)


def _name_largest(axis: Axes3D, cloud: HeadCloud, tokens: Sequence[str], paper: str) -> None:
    from matplotlib.patheffects import withStroke

    for index in _apart(cloud):
        if index < len(tokens):
            text = axis.text(
                *cloud.keys[index].tolist(), f"  {tokens[index]}", fontsize=8, zorder=9
            )
            text.set_parse_math(False)
            text.set_path_effects([withStroke(linewidth=2.5, foreground=paper)])


def _apart(cloud: HeadCloud) -> list[int]:
    """The keys with the most attention, those aside whose names would cover an earlier one's."""
    reach = _ROOM * float((cloud.keys.amax(0) - cloud.keys.amin(0)).max())
    found: list[int] = []
    for index in cloud.received.argsort(descending=True, stable=True).tolist():
        others = cloud.keys[found] - cloud.keys[index]
        if len(found) < _NAMED and bool((others.norm(dim=-1) > reach).all()):
            found.append(index)
    return found
