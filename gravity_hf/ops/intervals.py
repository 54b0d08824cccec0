"""What positions let a query see is one interval of keys: `lower_i <= j < upper_i`.

Causality, a window and key ranges each bound the interval at one end or both, and both ends move
forward along the queries, so that a block of queries sees an interval too.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Bounds(NamedTuple):
    """Between what the ends of the intervals of some queries lie, `0 <= ... <= Tk`."""

    least_lower: int
    most_lower: int
    least_upper: int
    most_upper: int

    @property
    def keys(self) -> slice:
        """Every key that some query may see; empty where start >= stop."""
        return slice(self.least_lower, self.most_upper)

    @property
    def partial(self) -> slice:
        """The keys among them that some query may not see; empty where start >= stop."""
        left, right = self.most_lower > self.least_lower, self.most_upper > self.least_upper
        start = self.least_lower if left else max(self.least_lower, self.least_upper)
        stop = self.most_upper if right else min(self.most_lower, self.most_upper)
        return slice(start, stop)

    @property
    def may_be_empty(self) -> bool:
        return self.most_lower >= self.least_upper


@dataclass(frozen=True)
class Intervals:
    """`causal`, `window` and `key_ranges` of `gravity_hf.ops.api.gravity_attention`."""

    queries: int
    keys: int
    causal: bool = False
    window: int | None = None
    key_ranges: Tensor | None = None

    @property
    def everything(self) -> bool:
        return not self.causal and self.window is None and self.key_ranges is None

    @property
    def only_causal(self) -> bool:
        return self.causal and self.window is None and self.key_ranges is None

    @property
    def _known(self) -> bool:
        """Whether the values of the ranges can be read without waiting for a device."""
        return self.key_ranges is not None and self.key_ranges.device.type == "cpu"

    def bounds(self, batch: slice, rows: slice) -> Bounds:
        first = rows.start + self.keys - self.queries
        last = first + rows.stop - rows.start - 1
        bounds = [0, 0, self.keys, self.keys]
        if self.window is not None:
            bounds[:2] = first - self.window + 1, last - self.window + 1
            bounds[2:] = first + self.window, last + self.window
        if self.causal:
            bounds[2:] = first + 1, last + 1
        if self._known:
            start, stop = (x.flatten() for x in self._ranges(batch, rows))
            bounds[:2] = max(bounds[0], int(start.min())), max(bounds[1], int(start.max()))
            bounds[2:] = min(bounds[2], int(stop.min())), min(bounds[3], int(stop.max()))
        elif self.key_ranges is not None:
            bounds[1:3] = self.keys, 0
        return Bounds(*(min(max(x, 0), self.keys) for x in bounds))

    def reach(self, rows: int) -> int:
        """The most keys that a block of `rows` queries sees, as far as a CPU can know."""
        reach = self.keys
        if self.window is not None:
            reach = min(reach, rows + (self.window - 1) * (1 if self.causal else 2))
        if self._known and 0 not in self.key_ranges.shape:
            first = torch.arange(0, self.queries, rows)
            last = (first + rows).clamp(max=self.queries) - 1
            if self.key_ranges.shape[1] == 1:
                first = last = torch.zeros(1, dtype=torch.int64)
            start, stop = self.key_ranges.unbind(-1)
            widest = (stop[:, last].amax(0) - start[:, first].amin(0)).amax()
            reach = min(reach, int(widest))
        return max(reach, 1)

    def hidden(
        self, batch: slice, rows: slice, keys: slice, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Bool `[b|1, 1, 1, rows|1, keys]`: outside the interval; and `[b|1, 1, 1, rows|1, 1]`: the
        interval is empty. For intervals that are not everything."""
        lower, upper = self._ends(batch, rows, device)
        column = torch.arange(keys.start, keys.stop, device=device)
        if lower is None:
            return column >= upper, upper <= 0
        if upper is None:
            return column < lower, lower >= self.keys
        empty = lower.clamp(min=0) >= upper.clamp(max=self.keys)
        return (column < lower) | (column >= upper), empty

    def _ends(
        self, batch: slice, rows: slice, device: torch.device
    ) -> tuple[Tensor | None, Tensor | None]:
        position = torch.arange(rows.start, rows.stop, device=device) + self.keys - self.queries
        position = position.view(1, 1, 1, -1, 1)
        lower = None if self.window is None else position - self.window + 1
        upper = None if self.window is None else position + self.window
        if self.causal:
            upper = position + 1
        if self.key_ranges is not None:
            start, stop = (x[:, None, None, :, None] for x in self._ranges(batch, rows))
            lower = start if lower is None else torch.maximum(lower, start)
            upper = stop if upper is None else torch.minimum(upper, stop)
        return lower, upper

    def _ranges(self, batch: slice, rows: slice) -> tuple[Tensor, Tensor]:
        """Starts and stops `[b|1, rows|1]`."""
        ranges = self.key_ranges
        ranges = ranges[batch] if ranges.shape[0] > 1 else ranges
        ranges = ranges[:, rows] if ranges.shape[1] > 1 else ranges
        return ranges[..., 0], ranges[..., 1]
