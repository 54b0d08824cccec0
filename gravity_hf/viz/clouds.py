"""Queries and keys of a head as points in space, as near to each other as the law takes them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .drawing import Drawing
from .recording import RecordedAttention
from .space import limits_of, principal_components, set_axes, write_names
from .style import BLUE, ORANGE, Theme, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from mpl_toolkits.mplot3d import Axes3D

_LARGEST, _SMALLEST = 420.0, 9.0


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
        return limits_of(torch.cat([self.queries, self.keys]))

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
    found = principal_components(centred)
    coordinates = centred @ found.directions.T
    count = query.shape[0]
    return HeadCloud(
        coordinates[:count], coordinates[count:], found.explained, recorded.received[head].double()
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
        names = dict(enumerate(tokens))
        write_names(axis, cloud.keys, cloud.received, names, theme.paper)
        set_axes(axis, cloud.axis_titles, cloud.limits)
        legend = axis.legend(loc="upper left", fontsize=8.5)
        # Their real sizes say nothing in a legend.
        for handle in legend.legend_handles:
            handle.set_sizes([36.0])
        return figure

    return Drawing("queries-and-keys", title, "", build)
