"""Points lie as far apart as the law says, and discs are as large as the attention they get."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gravity_hf.ops.reference import squared_distance
from gravity_hf.viz.clouds import cloud_figure, head_cloud
from gravity_hf.viz.interactive import interactive_cloud
from gravity_hf.viz.recording import RecordedAttention
from gravity_hf.viz.style import LIGHT, drawing_in


def _recorded(query: Tensor, key: Tensor, radius_sq: float | None = None) -> RecordedAttention:
    weights = (query @ key.T).softmax(-1)[None]
    radius = None if radius_sq is None else torch.tensor([radius_sq])
    seen = torch.ones_like(weights, dtype=torch.bool)
    return RecordedAttention(query[None], key[None], weights, weights, seen, radius)


def _distances(one: Tensor, other: Tensor) -> Tensor:
    return torch.cdist(one, other).square()


def test_a_cloud_of_three_dimensions_keeps_its_distances() -> None:
    frame = torch.linalg.qr(torch.randn(8, 3)).Q
    query, key = torch.randn(5, 3) @ frame.T + 3.0, torch.randn(7, 3) @ frame.T + 3.0
    cloud = head_cloud(_recorded(query, key), 0)
    torch.testing.assert_close(
        _distances(cloud.queries, cloud.keys), _distances(query, key).double(), rtol=1e-4, atol=1e-4
    )
    assert float(cloud.explained.sum()) == pytest.approx(1.0, abs=1e-5)
    assert cloud.explained.tolist() == sorted(cloud.explained.tolist(), reverse=True)


def test_lifted_keys_lie_where_the_law_takes_them() -> None:
    """Two dimensions and the lifting one are three."""
    query, key = torch.randn(5, 2), 0.5 * torch.randn(7, 2)
    radius_sq = float(key.square().sum(-1).max()) + 0.5
    cloud = head_cloud(_recorded(query, key, radius_sq), 0)
    law = squared_distance(query[None, None], key[None, None], torch.tensor([radius_sq]))[0, 0]
    torch.testing.assert_close(
        _distances(cloud.queries, cloud.keys), law.double(), rtol=1e-4, atol=1e-4
    )


def test_a_head_of_one_dimension_has_three_coordinates() -> None:
    cloud = head_cloud(_recorded(torch.randn(4, 1), torch.randn(4, 1)), 0)
    assert cloud.keys.shape == (4, 3)
    assert float(cloud.explained[0]) == pytest.approx(1.0)


def test_discs_grow_with_the_attention_received() -> None:
    cloud = head_cloud(_recorded(torch.randn(9, 4), 2 * torch.randn(12, 4)), 0)
    order = cloud.received.argsort()
    areas = cloud.areas[order]
    assert (areas.diff() >= 0).all()
    assert areas[-1] > areas[0] > 0
    # By area, not by diameter.
    first, second = order[-1], order[-2]
    share = float(cloud.received[second] / cloud.received[first])
    assert float(cloud.areas[second] / cloud.areas[first]) == pytest.approx(share)


@pytest.mark.parametrize("width", [1, 4], ids=["a-line", "a-cloud"])
def test_a_distance_is_as_long_along_every_axis(width: int) -> None:
    stretched = torch.randn(12, width) * torch.tensor([9.0, 3.0, 1.0, 0.5])[:width]
    cloud = head_cloud(_recorded(torch.randn(9, width), stretched), 0)
    limits, spans = cloud.limits, cloud.limits.diff(dim=-1).flatten()
    for points in (cloud.queries, cloud.keys):
        assert (points > limits[:, 0]).all() and (points < limits[:, 1]).all()
    # No axis is so short that its numbers would lie on each other.
    assert spans.min() > 0.25 * spans.max()
    with drawing_in(LIGHT):
        axis = cloud_figure(cloud, [], "title").build(LIGHT).axes[0]
    drawn = [end - start for start, end in (axis.get_xlim(), axis.get_ylim(), axis.get_zlim())]
    assert drawn == pytest.approx(spans.tolist())
    per_unit = [float(side) / span for side, span in zip(axis.get_box_aspect(), drawn, strict=True)]
    assert per_unit == pytest.approx([per_unit[0]] * 3)
    scene = interactive_cloud(cloud, [], "title", "caption").figure.layout.scene
    assert scene.aspectmode == "data"
    ranges = [list(getattr(scene, f"{name}axis").range) for name in "xyz"]
    assert ranges == [pytest.approx(ends) for ends in limits.tolist()]
