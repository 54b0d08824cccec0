"""Codes to compare a prior's with: each keeps what it says, and nothing more."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gravity_hf.models.geolip.prior_controls import gaussian_codes, mixed_codes, uniform_codes

from .prior_cases import D, N, V, frames

CONTROLS = [uniform_codes, mixed_codes, gaussian_codes]


@pytest.mark.parametrize("control", CONTROLS, ids=lambda f: f.__name__)
def test_a_control_is_frames_on_the_sphere_by_seed(control: Callable[..., Tensor]) -> None:
    first, again, other = (control(frames(20), 5, seed) for seed in (1, 1, 2))
    assert first.shape == (5, N, V, D) and torch.equal(first, again)
    assert not torch.equal(first, other)
    torch.testing.assert_close(first.norm(dim=-1), torch.ones(5, N, V))


def test_mixed_codes_are_real_ones_in_their_place_from_different_inputs() -> None:
    real = frames(8)
    mixed = mixed_codes(real, 50)
    same = (mixed[:, None] == real).all(-1).all(-1)  # [50, 8, N]
    assert same.any(1).all()
    assert not same.all(-1).any()


def test_gaussian_codes_have_mean_and_covariance_of_the_frames() -> None:
    real = frames(2, seed=4)[torch.randint(2, (500,))]  # two inputs: all that varies is one line
    drawn = gaussian_codes(real, 400).flatten(1).double()
    real = real.flatten(1).double()
    line = real.unique(dim=0).diff(dim=0)[0]
    torch.testing.assert_close(_spread(drawn, line), _spread(real, line), rtol=0.5, atol=0.0)


def _spread(codes: Tensor, line: Tensor) -> Tensor:
    return (codes @ (line / line.norm())).std()
