"""One call of the blockwise operator, and the parts of its tensors that belong to a block.

`q'` `[B, H, Tq, E]` and `k'` `[B, N, Tk, E]` are queries and keys augmented so that their product
is the softened squared distance, or with a cutoff or a curvature, which need it without eps, the
squared distance itself (`chunked.augment`); the last column of `k'` is ones.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import Block, Sizes, cut, iterate_blocks, mask_5d
from .curvature import Curvature
from .intervals import Intervals
from .near_blocks import near_blocks


@dataclass(frozen=True)
class Problem:
    """All floating tensors but the mask share one dtype; `registry.py` has the fields' types.

    q, k, eps: q', k' and `[H]`; None with a table.
    strength: `M^2`, negative where repulsive, times query masses where there are any,
    `[B|1, H, Tq|1]`. offset: the head's bias times query masses, shaped like strength. key_term:
    factor (force) or summand (power) of the score `[B, H, Tk]`. radius_sq: of the cutoff, `[H]`.
    table: inverse squared distances `[B|1, 1, Tq, Tk]`. sink: the sink's score `[B, H, Tq]`. seed:
    int64 `[1]`, of the dropout. cutoff: its kind. lifted: whether keys are, which only a soft cap
    asks. curvature_kappa, horizon: of a curvature, if the first is given. smooth_cap: `max_force`
    caps with a tanh. The rest as in `api.gravity_attention`.
    """

    q: Tensor | None
    k: Tensor | None
    v: Tensor
    strength: Tensor
    eps: Tensor | None
    offset: Tensor | None
    key_term: Tensor | None
    radius_sq: Tensor | None
    table: Tensor | None
    sink: Tensor | None
    mask: Tensor | None
    key_ranges: Tensor | None
    seed: Tensor | None
    law: str
    causal: bool
    window: int | None
    exclude_self: bool
    cutoff: str | None
    cutoff_width: float
    max_force: float | None
    dropout_p: float
    softcap: float | None
    lifted: bool
    curvature_kappa: float | None
    horizon: float
    smooth_cap: bool

    @property
    def curvature(self) -> Curvature | None:
        kappa = self.curvature_kappa
        return None if kappa is None else Curvature(kappa, self.horizon)

    @functools.cached_property
    def sizes(self) -> Sizes:
        batch, key_heads, keys, _ = self.v.shape
        queries = self.table.shape[2] if self.q is None else self.q.shape[2]
        return Sizes(batch, key_heads, self.strength.shape[1] // key_heads, queries, keys)

    def per_query(self, *width: int) -> Tensor:
        """Zeros `[B, H, Tq, *width]`."""
        sizes = self.sizes
        heads = sizes.key_heads * sizes.groups
        return self.v.new_zeros(sizes.batch, heads, sizes.queries, *width)

    def rows_of(self, tensor: Tensor, block: Block) -> Tensor:
        """The part of a per-query tensor `[B|1, H, Tq|1, ...]`: `[b|1, n, G, rows|1, ...]`."""
        tensor = tensor.unflatten(1, self.sizes[1:3])
        return cut(tensor, block.batch, block.heads, slice(None), block.rows)

    def keys_of(self, tensor: Tensor, block: Block) -> Tensor:
        """The part of a per-key tensor `[B, N, Tk, ...]` as `[b * n, keys, ...]`; a view, where the
        tensor is contiguous and the window has no index."""
        index = block.window.index
        if index is not None:
            return tensor[block.batch, block.heads].index_select(2, index).flatten(0, 1)
        return tensor[block.batch, block.heads, block.window.keys].flatten(0, 1)

    def add_to_keys(self, total: Tensor, block: Block, left: Tensor, right: Tensor) -> None:
        """`left @ right` `[b * n, keys, x]` to the block's part of `total` `[B, N, Tk, x]`."""
        index = block.window.index
        if index is None:
            self.keys_of(total, block).baddbmm_(left, right)
            return
        part = total[block.batch, block.heads]
        part.index_add_(2, index, torch.bmm(left, right).view(*part.shape[:2], *index.shape, -1))

    def key_columns(self, tensor: Tensor, block: Block) -> Tensor:
        """The part of a per-head, per-key tensor `[B, H, Tk]`: `[b, n, G, 1, keys]`."""
        tensor = tensor.unflatten(1, self.sizes[1:3]).unsqueeze(3)[block.batch, block.heads]
        index = block.window.index
        return tensor[..., block.window.keys] if index is None else tensor[..., index]

    def add_to_columns(self, total: Tensor, block: Block, part: Tensor) -> None:
        """`part` `[b, n, G, 1, keys]` to the block's part of `total` `[B, H, Tk]`."""
        index = block.window.index
        if index is None:
            self.key_columns(total, block).add_(part)
            return
        total = total.unflatten(1, self.sizes[1:3])[block.batch, block.heads]
        total.index_add_(3, index, part.squeeze(3))

    def heads_of(self, tensor: Tensor, block: Block) -> Tensor:
        """The part of a per-head tensor `[H]`: `[1, n, G, 1, 1]`."""
        return tensor.view(1, *self.sizes[1:3], 1, 1)[:, block.heads]

    def table_of(self, tensor: Tensor, block: Block) -> Tensor:
        """The part of a tensor like the table, `[B|1, 1, Tq, Tk]`: `[b|1, 1, 1, rows, keys]`."""
        part = cut(tensor, block.batch, slice(None), block.rows, block.window.keys)
        return part.unsqueeze(2)

    def fill_own_pairs(self, scores: Tensor, block: Block, value: float) -> None:
        """Sets the scores of the block's queries with the keys at their own positions."""
        sizes, window = self.sizes, block.window
        first = block.rows.start + sizes.keys - sizes.queries
        if window.index is None:
            scores.diagonal(first - window.keys.start, -2, -1).fill_(value)
            return
        own = torch.arange(first, first + block.rows.stop - block.rows.start)
        rows, columns = (own.unsqueeze(1) == window.index).nonzero().unbind(1)
        scores[..., rows, columns] = value

    def blocks(self) -> Iterator[Block]:
        sizes = self.sizes
        mask = None if self.mask is None else mask_5d(self.mask, sizes)
        where = (sizes.queries, sizes.keys, self.causal, self.window, self.key_ranges)
        intervals = Intervals(*where)
        near = self._near_blocks(intervals) if mask is None and self.cutoff == "hard" else None
        if near is not None:
            return near
        return iterate_blocks(sizes, mask, intervals, self.v.device, self.v.dtype)

    def _near_blocks(self, intervals: Intervals) -> Iterator[Block] | None:
        # A sphere round lifted keys would have to know what they are lifted by.
        if self.lifted:
            return None
        width = self.q.shape[3] - 2
        q, k = self.q[..., :width], self.k[..., :width]
        return near_blocks(self.sizes, intervals, q, k, self.radius_sq.sqrt())

    def generator(self) -> torch.Generator | None:
        """Restarted by forward and backward: both draw the same numbers, block after block."""
        if self.seed is None:
            return None
        return torch.Generator(self.v.device).manual_seed(int(self.seed))

    def keep(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Dropout factors: 0, or `1 / (1 - p)`."""
        kept = 1.0 - self.dropout_p
        return torch.empty_like(like).bernoulli_(kept, generator=generator).div_(kept)

    def shape(self, block: Block) -> tuple[int, ...]:
        """Of the block's scores: `[b, n, G, rows, keys]`."""
        parts = (block.batch, block.heads, block.rows)
        batch, heads, rows = (part.stop - part.start for part in parts)
        return batch, heads, self.sizes.groups, rows, block.window.count

    def product(self, block: Block, out: Tensor) -> Tensor:
        """`q'k'^T` into `out` `[b, n, G, rows, keys]`, which is returned; not clamped: rounding can
        leave a distance below 0."""
        queries, keys = self.rows_of(self.q, block), self.keys_of(self.k, block)
        torch.bmm(stack(queries), keys.mT, out=stack(out))
        return out

    def neutral(self, block: Block) -> Tensor:
        """`|q_i|^2 + kappa_j + eps`, where `q_i.k_j` were 0: `[b, n, G, rows, keys]`, with lifted
        keys `[b, n, G, rows, 1]`. For calls without a cutoff."""
        term = self.rows_of(self.q, block)[..., -1:]
        return term if self.lifted else self.beside(term, self.keys_of(self.k, block)[..., -2])

    @staticmethod
    def beside(rows: Tensor, keys: Tensor) -> Tensor:
        """The sums of `[b, n, G, rows, 1]` and `[b * n, keys]`."""
        return rows + keys.view(*rows.shape[:2], 1, 1, -1)


def stack(tensor: Tensor) -> Tensor:
    """`[b, n, G, rows, x]` as `[b * n, G * rows, x]`: heads that share a key head, stacked."""
    return tensor.flatten(0, 1).flatten(1, 2)


@dataclass(frozen=True)
class DecodingProblem(Problem):
    """Few queries: q and k as they are, `query_term` `[B, H, Tq, 1]` and `kappa`
    `[B, N, Tk, 1]` beside them, so that a long key cache is not copied for one token."""

    query_term: Tensor
    kappa: Tensor

    def product(self, block: Block, out: Tensor) -> Tensor:
        queries = self.rows_of(self.q, block)
        keys, kappa = self.keys_of(self.k, block), self.keys_of(self.kappa, block)
        torch.baddbmm(kappa.mT, stack(queries), keys.mT, alpha=-2.0, out=stack(out))
        return out.add_(self.rows_of(self.query_term, block))

    def _near_blocks(self, intervals: Intervals) -> None:
        # For few queries the spheres cost what they save.
        return None

    def neutral(self, block: Block) -> Tensor:
        term = self.rows_of(self.query_term, block)
        return term if self.lifted else self.beside(term, self.keys_of(self.kappa, block)[..., 0])
