"""One call of the blockwise operator, and the parts of its tensors that belong to a block.

`q'` `[B, H, Tq, E]` and `k'` `[B, N, Tk, E]` are queries and keys augmented so that their product
is the softened squared distance, or with a cutoff or a curvature, which need it without eps, the
squared distance itself (`chunked.augment`); the last column of `k'` is ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import Block, Sizes, cut, iterate_blocks, mask_5d
from .curvature import Curvature
from .intervals import Intervals


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

    @property
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
        tensor is contiguous."""
        return tensor[block.batch, block.heads, block.window.keys].flatten(0, 1)

    def key_columns(self, tensor: Tensor, block: Block) -> Tensor:
        """The part of a per-head, per-key tensor `[B, H, Tk]`: `[b, n, G, 1, keys]`."""
        tensor = tensor.unflatten(1, self.sizes[1:3]).unsqueeze(3)
        return tensor[block.batch, block.heads, :, :, block.window.keys]

    def heads_of(self, tensor: Tensor, block: Block) -> Tensor:
        """The part of a per-head tensor `[H]`: `[1, n, G, 1, 1]`."""
        return tensor.view(1, *self.sizes[1:3], 1, 1)[:, block.heads]

    def table_of(self, tensor: Tensor, block: Block) -> Tensor:
        """The part of a tensor like the table, `[B|1, 1, Tq, Tk]`: `[b|1, 1, 1, rows, keys]`."""
        part = cut(tensor, block.batch, slice(None), block.rows, block.window.keys)
        return part.unsqueeze(2)

    def own_pairs(self, scores: Tensor, block: Block) -> Tensor:
        """A view of the scores of the block's queries with the keys at their own positions."""
        sizes = self.sizes
        offset = block.rows.start + sizes.keys - sizes.queries - block.window.keys.start
        return scores.diagonal(offset, -2, -1)

    def blocks(self) -> Iterator[Block]:
        sizes = self.sizes
        mask = None if self.mask is None else mask_5d(self.mask, sizes)
        where = (sizes.queries, sizes.keys, self.causal, self.window, self.key_ranges)
        return iterate_blocks(sizes, mask, Intervals(*where), self.v.device, self.v.dtype)

    def generator(self) -> torch.Generator | None:
        """Restarted by forward and backward: both draw the same numbers, block after block."""
        if self.seed is None:
            return None
        return torch.Generator(self.v.device).manual_seed(int(self.seed))

    def keep(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Dropout factors: 0, or `1 / (1 - p)`."""
        kept = 1.0 - self.dropout_p
        return torch.empty_like(like).bernoulli_(kept, generator=generator).div_(kept)

    def product(self, block: Block) -> Tensor:
        """`q'k'^T`, not clamped: rounding can leave a distance below 0."""
        queries = self.rows_of(self.q, block)
        keys = self.keys_of(self.k, block)
        product = torch.bmm(stack(queries), keys.mT)
        return product.view(*queries.shape[:-1], keys.shape[1])

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

    def product(self, block: Block) -> Tensor:
        queries = self.rows_of(self.q, block)
        keys, kappa = self.keys_of(self.k, block), self.keys_of(self.kappa, block)
        product = torch.baddbmm(kappa.mT, stack(queries), keys.mT, alpha=-2.0)
        product = product.view(*queries.shape[:-1], keys.shape[1])
        return product.add_(self.rows_of(self.query_term, block))

    def neutral(self, block: Block) -> Tensor:
        term = self.rows_of(self.query_term, block)
        return term if self.lifted else self.beside(term, self.keys_of(self.kappa, block)[..., 0])
