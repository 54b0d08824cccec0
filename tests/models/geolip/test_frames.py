"""Frames: angles between their rows, deviations, and what is measured of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gravity_hf.models.geolip.frames import (
    angle_baseline,
    canonical,
    critical_deviation,
    effective_rank,
    frame_deviation,
    random_frames,
    rigidity_barrier,
    simplex_volume_spread,
    spectrum,
)


def frames(count: int, rows: int, d: int = 4, seed: int = 0) -> Tensor:
    return random_frames((count, rows), d, torch.Generator().manual_seed(seed))


def test_baseline_is_known_in_closed_form() -> None:
    known = {2: math.pi / 4, 3: 1.0, 4: math.pi / 4 + 1 / math.pi, 5: 7 / 6}
    for d, expected in known.items():
        assert angle_baseline(d) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("d", [2, 3, 6, 7, 16, 64])
def test_baseline_is_the_integral(d: int) -> None:
    angle = (torch.arange(200_000, dtype=torch.float64) + 0.5) * (math.pi / 2 / 200_000)
    weight = angle.sin() ** (d - 2)
    assert angle_baseline(d) == pytest.approx(
        float((angle * weight).sum() / weight.sum()), abs=1e-9
    )


def test_monte_carlo_baseline_is_the_published_one() -> None:
    assert angle_baseline(4, "mc4096") == pytest.approx(1.103471, abs=1e-6)
    assert angle_baseline(16, "mc4096") == pytest.approx(1.363751, abs=1e-6)
    assert angle_baseline(4, "mc4096") == pytest.approx(angle_baseline(4), abs=1e-3)
    with pytest.raises(ValueError, match="d >= 2 and one of"):
        angle_baseline(4, "guess")


def test_envelope_is_two_percent_of_the_root() -> None:
    assert critical_deviation(4) == pytest.approx(0.040)
    assert critical_deviation(16) == pytest.approx(0.080)


def test_random_frames_of_32_rows_spread_by_0_0145_and_mostly_lie_inside() -> None:
    found = frame_deviation(frames(3000, 32))
    assert found.dtype == torch.float64
    assert float(found.mean()) == pytest.approx(0.0, abs=1e-3)
    assert float(found.std()) == pytest.approx(0.0145, abs=0.001)
    inside = float((found.abs() < critical_deviation(4)).double().mean())
    assert inside == pytest.approx(0.985, abs=0.006)


def test_many_frames_are_measured_as_each_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    many = frames(6, 9).view(2, 3, 9, 4)
    known = torch.stack([frame_deviation(frame) for frame in many.flatten(0, 1)]).view(2, 3)
    monkeypatch.setattr("gravity_hf.models.geolip.frames._PAIRS", 200)
    for given in (many, many.clone().requires_grad_()):
        torch.testing.assert_close(frame_deviation(given).detach(), known, atol=1e-12, rtol=0)


def test_deviation_says_which_way_rows_depart() -> None:
    axes = torch.eye(4)
    assert float(frame_deviation(axes)) == pytest.approx(math.pi / 2 - angle_baseline(4))
    gathered = torch.nn.functional.normalize(frames(1, 16)[0] * 0.1 + axes[0], dim=-1)
    assert float(frame_deviation(gathered)) < -0.5


def test_deviation_knows_no_signs_no_order_and_no_rotation() -> None:
    frame = frames(1, 10)[0].double()
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64))[0]
    signs = torch.where(torch.arange(10) % 3 == 0, -1.0, 1.0)[:, None]
    other = (signs * frame @ rotation)[torch.randperm(10)]
    torch.testing.assert_close(frame_deviation(other), frame_deviation(frame), atol=1e-12, rtol=0)


def test_barrier_costs_nothing_within_its_margin_and_pushes_back_beyond() -> None:
    deviation = torch.tensor([0.0, 0.019, -0.03, 0.05, 9.0], requires_grad=True)
    counted = torch.tensor([True, True, True, True, False])
    found = rigidity_barrier(deviation, 4, coefficient=0.02, margin=0.5, mask=counted)
    assert found.item() == pytest.approx((0.01**2 + 0.03**2) / 4, rel=1e-5)
    found.backward()
    assert deviation.grad.sign().tolist() == [0.0, 0.0, -1.0, 1.0, 0.0]


def test_angles_of_equal_rows_have_finite_gradients() -> None:
    frame = torch.eye(4)[[0, 0, 1, 2]].requires_grad_()
    frame_deviation(frame).backward()
    assert frame.grad.isfinite().all()


def test_canonical_rows_are_one_for_each_direction() -> None:
    rows = torch.tensor([[-1e-9, -0.6, 0.8], [0.6, -0.8, 0.0], [0.0, 0.0, 0.0]])
    expected = torch.tensor([[1e-9, 0.6, -0.8], [0.6, -0.8, 0.0], [0.0, 0.0, 0.0]])
    assert torch.equal(canonical(rows), expected)
    assert torch.equal(canonical(-rows), canonical(rows))


def test_effective_rank_counts_directions() -> None:
    axes, line = torch.eye(4).repeat(3, 1), torch.eye(4)[:1].repeat(12, 1)
    torch.testing.assert_close(spectrum(axes), torch.full((4,), math.sqrt(3)).double())
    assert float(effective_rank(spectrum(axes))) == pytest.approx(4.0)
    assert float(effective_rank(spectrum(line))) == pytest.approx(1.0, abs=1e-5)


def test_simplex_volumes_of_random_directions_vary_as_published() -> None:
    frame = frames(1, 200, 16)[0]
    found = simplex_volume_spread(frame)
    assert 0.20 < found < 0.23
    assert simplex_volume_spread(frame) == found != simplex_volume_spread(frame, seed=1)
    assert simplex_volume_spread(3 * frame) == pytest.approx(found)
    assert simplex_volume_spread(frame[:4]) == 0.0
    assert simplex_volume_spread(torch.eye(16)[:1].repeat(20, 1)) == 0.0
