"""Shares of groups in what the loss lost."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch import nn

from gravity_hf.training.governed import LossContribution


def test_shares_are_those_of_the_averages() -> None:
    one = LossContribution("ab", decay=0.5)
    assert one.shares() == {"a": 0.0, "b": 0.0}
    assert one.update({"a": 3.0, "b": 1.0}) == {"a": 0.75, "b": 0.25}
    # Averages 1.5 and 0.5, then 0.75 and 1.25.
    assert one.update({"b": 2.0}) == {"a": pytest.approx(0.375), "b": pytest.approx(0.625)}


@pytest.mark.parametrize("gain", [-5.0, math.nan, math.inf])
def test_what_gained_nothing_counts_nothing(gain: float) -> None:
    one = LossContribution("ab", decay=0.0)
    assert one.update({"a": gain, "b": 1.0}) == {"a": 0.0, "b": 1.0}


def test_the_first_order_gain_is_what_the_loss_lost() -> None:
    """Of a small step of gradient descent: the shares of the two halves, against the true fall."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    x, y = torch.randn(32, 3).double(), torch.randn(32, 1).double()

    def loss() -> torch.Tensor:
        return (model(x) - y).square().mean()

    first = loss()
    first.backward()
    gains = {}
    with torch.no_grad():
        for name, part in (("a", model[0]), ("b", model[2])):
            steps = [-1e-5 * p.grad for p in part.parameters()]
            gains[name] = 0.0
            for parameter, step in zip(part.parameters(), steps, strict=True):
                gains[name] -= float((parameter.grad * step).sum())
                parameter += step
        lost = float(first - loss())
    assert sum(gains.values()) == pytest.approx(lost, rel=1e-3)
    shares = LossContribution("ab").update(gains)
    assert shares["a"] == pytest.approx(gains["a"] / sum(gains.values()))


def test_a_state_in_json_goes_on() -> None:
    one, other = LossContribution("ab"), LossContribution("ab")
    one.update({"a": 1.0, "b": 2.0})
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.update({"a": 1.0}) == one.update({"a": 1.0})
    with pytest.raises(ValueError, match="groups"):
        LossContribution("ac").load_state_dict(one.state_dict())
    with pytest.raises(ValueError, match="groups"):
        one.update({"c": 1.0})
