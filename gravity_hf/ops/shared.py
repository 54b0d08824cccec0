"""One call in which all heads share one distance, and the parts of its tensors that belong to rows.

A model that attends by position has one table of distances for the batch and all heads, or one for
each batch entry. Here it is given, or computed from positions for some rows at a time and used by
all batch entries and heads before the next ones. Formulas: README.md.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .blocks import ELEMENTS, ROWS_MASKED, Sizes, Window, cut, mask_5d, ranges, window_of
from .curvature import Curvature
from .intervals import Intervals


class Rows(NamedTuple):
    """Queries whose scores are computed one after another, and the keys that they see."""

    rows: slice
    window: Window


class Part(NamedTuple):
    """The batch entries and key heads whose scores exist at a time.

    whole: with the rows and keys of the block these are all scores, and no tensor need be cut.
    """

    batch: slice
    heads: slice
    whole: bool


class Base(NamedTuple):
    """What the law makes the scores of some rows of, for all heads.

    value: `1 / n`, n the softened distance, or under the power law `ln(1 / n)`:
    `[B|1, 1, 1, rows, keys]`. distance_sq: `[B|1, rows, keys]`, of positions; not clamped.
    """

    value: Tensor
    distance_sq: Tensor | None = None


@dataclass(frozen=True)
class SharedProblem:
    """All floating tensors but the mask share one dtype; `shared_op.py` has the fields' types.

    q, k: augmented positions `[b, Tq, E]`, `[b, Tk, E]`, b 1 or B, with `q'.k' = d^2`
    (`chunked.augment`); None with a table. table: inverse squared distances `[B|1, 1, Tq, Tk]`.
    strength: `M^2`, negative where repulsive, times query masses where there are any,
    `[B|1, H, Tq|1]`. key_term: factor (force) or summand (power) of the score `[B, H, Tk]`. eps: of
    positions. curvature_kappa, horizon: of a curvature, if the first is given. smooth_cap:
    `max_force` caps with a tanh. The rest as in `api.gravity_attention`; the mask has no gradient
    here.
    """

    q: Tensor | None
    k: Tensor | None
    v: Tensor
    strength: Tensor
    key_term: Tensor | None
    table: Tensor | None
    mask: Tensor | None
    key_ranges: Tensor | None
    law: str
    causal: bool
    window: int | None
    exclude_self: bool
    max_force: float | None
    smooth_cap: bool
    eps: float
    curvature_kappa: float | None
    horizon: float

    @functools.cached_property
    def sizes(self) -> Sizes:
        batch, key_heads, keys, _ = self.v.shape
        queries = self.q.shape[1] if self.table is None else self.table.shape[2]
        return Sizes(batch, key_heads, self.strength.shape[1] // key_heads, queries, keys)

    @functools.cached_property
    def curvature(self) -> Curvature | None:
        kappa = self.curvature_kappa
        return None if kappa is None else Curvature(kappa, self.horizon)

    @functools.cached_property
    def row_factors(self) -> Tensor:
        """`strength` as `[B, N, G, Tq, 1]`."""
        batch, key_heads, groups, queries, _ = self.sizes
        strength = self.strength.expand(batch, -1, queries)
        return strength.view(batch, key_heads, groups, queries, 1)

    @functools.cached_property
    def key_columns(self) -> Tensor | None:
        """`key_term` as `[B, N, G, 1, Tk]`."""
        if self.key_term is None:
            return None
        batch, key_heads, groups, _, keys = self.sizes
        return self.key_term.view(batch, key_heads, groups, 1, keys)

    @functools.cached_property
    def budget(self) -> int:
        """Of scores at a time."""
        return ELEMENTS["cpu" if self.v.device.type == "cpu" else "gpu"]

    def blocks(self) -> Iterable[Rows]:
        """Every group of rows that sees a key, in order."""
        sizes = self.sizes
        if 0 in sizes:
            return ()
        kind = "cpu" if self.v.device.type == "cpu" else "gpu"
        plain = self.mask is None and self.key_ranges is None and self.window is None
        if plain and kind == "cpu" and not (self.causal and sizes.queries > sizes.keys):
            return _plain_blocks(sizes, self.causal, ROWS_MASKED[kind], self.budget, self.v.dtype)
        mask = None if self.mask is None else mask_5d(self.mask, sizes)
        intervals = Intervals(sizes.queries, sizes.keys, self.causal, self.window, self.key_ranges)
        limits = ROWS_MASKED[kind], self.budget
        return _blocks(sizes, intervals, mask, limits, self.v.device, self.v.dtype)

    def parts(self, block: Rows) -> Iterator[Part]:
        batch, key_heads, groups, queries, keys = self.sizes
        sides = _length(block.rows), _length(block.window.keys)
        heads = max(1, self.budget // (groups * sides[0] * sides[1]))
        batches = min(max(1, heads // key_heads), batch)
        whole = (batches, *sides) == (batch, queries, keys) and heads >= key_heads
        for batch_part in ranges(batch, batches):
            for head_part in ranges(key_heads, min(heads, key_heads)):
                yield Part(batch_part, head_part, whole)

    def shape(self, block: Rows, part: Part) -> tuple[int, ...]:
        """Of the part's scores: `[b, n, G, rows, keys]`."""
        rows, keys = _length(block.rows), _length(block.window.keys)
        return _length(part.batch), _length(part.heads), self.sizes.groups, rows, keys

    def base(self, block: Rows) -> Base:
        if self.table is not None:
            inverse = _block_of(self.table, block).unsqueeze(2)
            return Base(inverse.log() if self.law == "power" else inverse)
        distance_sq = torch.bmm(self.q[:, block.rows], self.k[:, block.window.keys].mT)
        softened = distance_sq.clamp(min=0.0)
        if self.curvature is not None:
            softened = self.curvature.distance(softened)
        softened.add_(self.eps)
        value = softened.log_().neg_() if self.law == "power" else softened.reciprocal_()
        return Base(value[:, None, None], distance_sq)

    def base_gradient(self, block: Rows, base: Base, grads: dict[str, Tensor]) -> Tensor:
        """Zeros like `base.value`, for the sum of what all heads add: of a table the place where it
        belongs, which is touched once."""
        if self.table is not None:
            return _block_of(grads["table"], block).unsqueeze(2)
        return torch.zeros_like(base.value)

    def differentiate_base(
        self, block: Rows, base: Base, grad: Tensor, grads: dict[str, Tensor]
    ) -> None:
        """From `base_gradient`, overwritten like `base`, to the table, or to q' and k'."""
        if self.table is not None:
            if self.law == "power":
                grad.div_(_block_of(self.table, block).unsqueeze(2))
            return
        grad, value = grad[:, 0, 0], base.value[:, 0, 0]
        # d(1 / n) = -dn / n^2 and d(-ln n) = -dn / n.
        grad.mul_(value.exp_() if self.law == "power" else value.square_()).neg_()
        if self.curvature is None:
            grad.mul_(base.distance_sq.ge_(0.0))
        else:
            grad.mul_(self.curvature.slope(base.distance_sq.clamp_(min=0.0)))
        query, key = self.q[:, block.rows], self.k[:, block.window.keys]
        grads["k"][:, block.window.keys].baddbmm_(grad.mT, query)
        result = torch.bmm(grad, key)
        # Ones in k' make the last column a row sum, of terms that nearly cancel: a reduction loses
        # fewer digits of it than a product does.
        torch.sum(grad, -1, out=result[..., -1])
        grads["q"][:, block.rows] = result


def _blocks(
    sizes: Sizes,
    intervals: Intervals,
    mask: Tensor | None,
    limits: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> Iterator[Rows]:
    """`limits`: the most rows where some keys are hidden, and the most scores at a time."""
    batch, _, groups, queries, _ = sizes
    masked_rows, budget = limits
    rows = queries
    if not intervals.everything or mask is not None:
        rows = min(rows, max(1, masked_rows // groups))
    rows = min(rows, max(1, budget // (groups * intervals.reach(rows))))
    everyone, whole = slice(0, batch), slice(None)
    for part in ranges(queries, rows):
        tile = None if mask is None else cut(mask, whole, whole, whole, part)
        window = window_of(intervals, everyone, part, tile, device, dtype)
        if window is not None:
            yield Rows(part, window)


@functools.lru_cache(maxsize=16)
def _plain_blocks(
    sizes: Sizes, causal: bool, masked_rows: int, budget: int, dtype: torch.dtype
) -> tuple[Rows, ...]:
    """On a CPU, where sizes alone say who sees whom. Kept, as all layers of a model have the same:
    to make them costs a short sequence as much as a product does."""
    intervals = Intervals(sizes.queries, sizes.keys, causal)
    device = torch.device("cpu")
    return tuple(_blocks(sizes, intervals, None, (masked_rows, budget), device, dtype))


def _block_of(table: Tensor, block: Rows) -> Tensor:
    return table[:, :, block.rows, block.window.keys]


def _length(part: slice) -> int:
    return part.stop - part.start
