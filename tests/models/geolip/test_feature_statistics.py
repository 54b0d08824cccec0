"""Statistics of features in one pass, against the same computed at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gravity_hf.models.geolip.features import FeatureWindow, feature_statistics


def _features(count: int = 400, width: int = 6) -> Tensor:
    """Correlated, with a mean far from 0, one dimension that is constant, and one that is the sum
    of two others."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width, generator=generator)
    rows = torch.randn(count, width, generator=generator) @ mixing + 100.0
    rows[:, 2] = 3.0
    rows[:, 5] = rows[:, 0] + rows[:, 1]
    return rows


def _windows(rows: Tensor) -> list[FeatureWindow]:
    return [FeatureWindow(part, i) for i, part in enumerate(rows.split([1, 150, 0, 249]))]


def test_zscore_is_that_of_all_tokens() -> None:
    rows = _features()
    found = feature_statistics(_windows(rows))
    torch.testing.assert_close(found.mean, rows.double().mean(0).float())
    std = rows.double().std(0, correction=0).clamp(min=1e-6).float()
    torch.testing.assert_close(found.std, std)
    assert found.whitening is None


def test_a_tensor_counts_as_one_window() -> None:
    rows = _features()
    at_once, streamed = feature_statistics(rows.view(4, 100, -1)), feature_statistics([rows])
    assert torch.equal(at_once.mean, streamed.mean) and torch.equal(at_once.std, streamed.std)


def test_whitened_features_are_uncorrelated() -> None:
    rows = _features()
    found = feature_statistics(_windows(rows), "whiten")
    white = ((rows - found.mean) / found.std @ found.whitening).double()
    variances = torch.linalg.eigvalsh(white.T @ white / len(rows))
    # Two directions vary by what rounding leaves of them.
    assert bool((variances[:2] < 0.1).all())
    torch.testing.assert_close(variances[2:], torch.ones_like(variances[2:]), atol=1e-3, rtol=0)


def test_whitening_is_symmetric() -> None:
    whitening = feature_statistics(_features(), "whiten").whitening
    torch.testing.assert_close(whitening, whitening.T)


def test_large_means_cost_no_digits() -> None:
    rows = _features().double() * 1e-3 + 1e6
    torch.testing.assert_close(
        feature_statistics(_windows(rows)).std,
        rows.std(0, correction=0).clamp(min=1e-6).float(),
        rtol=1e-4,
        atol=0,
    )


def test_none_leaves_features_as_they_are() -> None:
    found = feature_statistics(_windows(_features()), "none")
    assert torch.equal(found.mean, torch.zeros(6)) and torch.equal(found.std, torch.ones(6))


@pytest.mark.parametrize(
    ("windows", "kind", "message"),
    [
        ([], "zscore", "at least one token"),
        ([torch.full((2, 3), float("nan"))], "zscore", "finite"),
        ([torch.ones(2, 3), torch.ones(2, 4)], "zscore", "3 dimensions"),
        ([torch.ones(2, 3)], "robust", "expected kind"),
    ],
)
def test_what_has_no_statistics_is_refused(windows: list, kind: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        feature_statistics(windows, kind)
