"""Shared by all tests: the error budget."""

from __future__ import annotations

import torch
from torch import Tensor


def assert_within_budget(
    name: str, actual: Tensor, exact: Tensor, peer: Tensor, *, factor: float = 2.0
) -> None:
    """`actual` may err at most `factor` times as much as `peer` does, plus one rounding unit.

    actual: the implementation under test. exact: the float64 reference. peer: the reference run in
    the dtype of the implementation.
    """
    exact = exact.double()
    unit = torch.finfo(actual.dtype).eps * exact.abs().max()
    budget = factor * ((peer.double() - exact).abs().max() + unit)
    error = (actual.double() - exact).abs().max()
    assert actual.isfinite().all(), f"{name}: non-finite values"
    assert error <= budget, f"{name}: error {error:.2e}, budget {budget:.2e}"
