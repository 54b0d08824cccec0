"""Means, deviations and principal directions of features, in one pass over them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

# No deviation counts as smaller: a dimension may be constant.
STD_FLOOR = 1e-6
# Of the largest variance, what no direction counts as smaller than, so that whitening has an
# inverse in float32 and does not blow up what features hardly have.
VARIANCE_FLOOR = 1e-6

Kind = Literal["zscore", "whiten", "none"]


@dataclass(frozen=True)
class FeatureStatistics:
    """What features are normalised with: `(x - mean) / std`, then `@ whitening` where it is there.

    Attributes:
        mean, std: float32 `[C]`, in the units of the features; over tokens, divided by their count.
        whitening: float32 `[C, C]`; symmetric, so that what is whitened stays as near to what it
            was as it can: the inverse square root of the correlations.
    """

    mean: Tensor
    std: Tensor
    whitening: Tensor | None = None


def feature_statistics(windows: Tensor | Iterable[Any], kind: Kind = "zscore") -> FeatureStatistics:
    """Statistics over all tokens; sums are float64, and no more than one window is held.

    Args:
        windows: a tensor `[..., C]`, or `FeatureWindow`s or tensors `[n, C]`, one after the other.
        kind: `"zscore"`: mean and standard deviation, at least 1e-6; `"whiten"`: also the whitening
            matrix, in which no direction counts as less than 1e-6 of the largest; `"none"`: 0, 1.

    Raises:
        ValueError: another kind, no tokens, or features that are not finite.
    """
    if kind not in ("zscore", "whiten", "none"):
        raise ValueError(
            f"feature_statistics: expected kind 'zscore', 'whiten' or 'none', got {kind!r}"
        )
    sums = _Sums(squares=kind == "zscore", products=kind == "whiten")
    for window in [windows] if isinstance(windows, Tensor) else windows:
        sums.add(window if isinstance(window, Tensor) else window.features)
        if kind == "none" and sums.count:
            width = sums.mean.shape[0]
            return FeatureStatistics(torch.zeros(width), torch.ones(width))
    if not sums.count:
        raise ValueError(
            "feature_statistics: expected features of at least one token, got none. Give windows "
            "that are not empty; an iterator that has been read to its end has none left"
        )
    return sums.statistics()


class _Sums:
    """Sums of features less the mean of the first window, which keeps digits where a mean is large
    beside its deviation."""

    def __init__(self, squares: bool, products: bool) -> None:
        self.count = 0
        self._squares, self._products = squares, products
        self._start = self._sum = self._second = torch.zeros(0)

    @property
    def mean(self) -> Tensor:
        return self._start + self._sum / self.count

    def add(self, features: Tensor) -> None:
        rows = features.detach().reshape(-1, features.shape[-1]).to(torch.float64)
        if not len(rows):
            return
        if not bool(rows.isfinite().all()):
            raise ValueError(
                "feature_statistics: expected finite features, got nan or inf. Load the host in "
                "float32, or take another layer"
            )
        width = rows.shape[-1]
        if not self.count:
            self._start = rows.mean(0)
            self._sum = torch.zeros_like(self._start)
            shape = (width, width) if self._products else (width,)
            self._second = rows.new_zeros(shape)
        if width != len(self._start):
            raise ValueError(
                f"feature_statistics: expected {len(self._start)} dimensions as in the first "
                f"window, got {width}"
            )
        self.count += len(rows)
        shifted = rows - self._start
        self._sum += shifted.sum(0)
        if self._products:
            self._second += shifted.T @ shifted
        elif self._squares:
            self._second += shifted.square().sum(0)

    def statistics(self) -> FeatureStatistics:
        shift = self._sum / self.count
        if not self._products:
            variance = self._second / self.count - shift.square()
            std = variance.clamp(min=0).sqrt().clamp(min=STD_FLOOR)
            return FeatureStatistics(self.mean.float(), std.float())
        covariance = self._second / self.count - torch.outer(shift, shift)
        std = covariance.diagonal().clamp(min=0).sqrt().clamp(min=STD_FLOOR)
        correlation = covariance / torch.outer(std, std)
        variances, directions = torch.linalg.eigh(correlation)
        floored = variances.clamp(min=VARIANCE_FLOOR * float(variances[-1].clamp(min=1.0)))
        whitening = (directions * floored.rsqrt()) @ directions.T
        return FeatureStatistics(self.mean.float(), std.float(), whitening.float())


__all__ = ["FeatureStatistics", "feature_statistics"]
