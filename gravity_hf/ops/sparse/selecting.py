"""Which keys each query looks at: its first and last ones, and the best blocks between them.

Every choice is made from the query's own row of scores, so no later token can change it. Ties go to
the later block: a score and its block number are compared as one integer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..blocks import ranges
from .budget import KeyBudget
from .checks import check_selection
from .products import exact
from .triton import chooses_by_triton, ranks_by_triton
from .visibility import Visibility, visibility

# Block scores held at a time; each takes 16 bytes on its way.
_ELEMENTS = {"cpu": 2**18, "gpu": 2**25}
_NEVER = -(2**63)


@dataclass(frozen=True, eq=False)
class Selection:
    """blocks: int64 `[B, G, Tq, N]`, the chosen blocks of each query in each key-value head, -1
    where a place is empty. Block `u` of batch row `b` holds the keys from `origin[b] + u *
    block_size` on. Beside them a query sees its `sinks` first and `window` last visible keys."""

    blocks: Tensor
    visible: Visibility
    budget: KeyBudget

    def rows(self, rows: slice | Tensor) -> Selection:
        """That of some of the queries; rows: a slice, or int64 `[R]`."""
        return Selection(self.blocks[:, :, rows], self.visible.rows(rows), self.budget)

    def mask(self) -> Tensor:
        """Bool `[B, G, Tq, Tk]`: whether a query sees a key."""
        seen = self.visible
        key = torch.arange(seen.keys, device=self.blocks.device)
        edges = self._is_sink(key) | (key > self._before_window())
        return seen.mask() & (edges | self.chosen()[..., : seen.keys])

    def chosen(self) -> Tensor:
        """Bool `[B, G, Tq, Tk + ...]`: whether a key lies in a chosen block."""
        size = self.budget.block_size
        flags = self.block_flags().repeat_interleave(size, 3)
        origin = self.visible.origin
        if origin is None:
            return flags
        place = torch.arange(self.visible.keys, device=flags.device) - origin[:, None]
        inside = (place >= 0)[:, None, None]
        place = place.clamp(min=0)[:, None, None].expand(*flags.shape[:3], -1)
        return flags.gather(3, place) & inside

    def block_flags(self) -> Tensor:
        """Bool `[B, G, Tq, ceil(Tk / block_size)]`: the chosen blocks."""
        count = -(-self.visible.keys // self.budget.block_size)
        flags = torch.zeros(
            *self.blocks.shape[:3], count + 1, dtype=torch.bool, device=self.blocks.device
        )
        # Empty places go to one block too many.
        places = self.blocks.masked_fill(self.blocks < 0, count)
        return flags.scatter_(3, places, True)[..., :count]

    def indices(self) -> tuple[Tensor, Tensor]:
        """Keys int64 `[B, G, Tq, S]`, in range, and which of them are meant, bool; each key is
        meant at most once. `S` is `sinks + N * block_size + window`."""
        budget, seen, device = self.budget, self.visible, self.blocks.device
        size = budget.block_size
        lead = self.blocks.shape[:3]
        start = self.blocks * size
        if seen.origin is not None:
            start = start + seen.origin[:, None, None, None]
        inside = torch.arange(size, device=device)
        blocks = (start.unsqueeze(-1) + inside).flatten(3)
        meant = (self.blocks >= 0).unsqueeze(-1).expand(*self.blocks.shape, size).flatten(3)
        meant = meant & ~self._is_sink(blocks) & (blocks <= self._before_window())
        sinks = _row(seen.first) + torch.arange(budget.sinks, device=device)
        window = self._before_window() + 1 + torch.arange(budget.window, device=device)
        sinks_meant = (sinks <= self._before_window()).expand(*lead, -1)
        index = torch.cat([sinks.expand(*lead, -1), blocks, window.expand(*lead, -1)], 3)
        everywhere = meant.new_ones(1).expand(*lead, budget.window)
        meant = torch.cat([sinks_meant, meant, everywhere], 3)
        meant = meant & (index >= 0) & (index < seen.keys)
        index = index.clamp(0, seen.keys - 1)
        return index, meant & seen.at(index)

    def _is_sink(self, key: Tensor) -> Tensor:
        return key < _row(self.visible.first) + self.budget.sinks

    def _before_window(self) -> Tensor:
        """The last key before the window, `[B|1, 1, Tq, 1]`."""
        return _row(self.visible.last) - self.budget.window


def _row(x: Tensor) -> Tensor:
    return x[:, None, :, None]


def block_means(screen_k: Tensor, block_size: int, origin: Tensor | None = None) -> Tensor:
    """The mean screening key of each block, `[B, G, ceil(Tk / block_size), ds]` in float32 (float64
    for float64). A last block that is not full has a mean that nobody reads."""
    dtype = torch.float64 if screen_k.dtype == torch.float64 else torch.float32
    keys = screen_k.shape[2]
    if block_size == 1 and origin is None:
        return screen_k.to(dtype)
    missing = -keys % block_size
    if origin is not None:
        place = torch.arange(keys + missing, device=screen_k.device) + origin[:, None]
        place = place.clamp(max=max(keys - 1, 0))[:, None, :, None]
        screen_k = screen_k.gather(2, place.expand(*screen_k.shape[:2], -1, screen_k.shape[3]))
    elif missing:
        screen_k = torch.nn.functional.pad(screen_k, (0, 0, 0, missing))
    return screen_k.unflatten(2, (-1, block_size)).mean(3, dtype=dtype)


def select_keys(
    screen_q: Tensor,
    screen_k: Tensor,
    budget: KeyBudget,
    *,
    metric: str,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    origin: Tensor | None = None,
    means: Tensor | None = None,
) -> Selection:
    """The choice of every query, one for all query heads that share a key-value head.

    Args:
        screen_q: screening queries `[B, H, Tq, ds]`; those of a group are averaged.
        screen_k: screening keys `[B, G, Tk, ds]`.
        metric: `"dot"`: the best blocks are those whose mean screening key is most aligned with the
            query; `"distance"`: those whose mean is nearest.
        mask, positions: as in `sparse_attention`.
        origin: int `[1]` or `[B]`, the key from which blocks of a batch row are counted; by default
            the first one that any of its queries sees. To be given where that moves while a cache
            grows, as under a sliding window (block_size > 1).
        means: `block_means(screen_k, block_size, origin)`, where a cache keeps them. Beside them
            blocks are counted from key 0 unless `origin` says otherwise.

    Returns:
        A `Selection`. Nothing of size `Tq * Tk` is made but by a mask of that size.
    """
    check_selection(screen_q, screen_k, budget, metric, mask, positions, origin)
    with torch.no_grad():
        keys = screen_k.shape[2]
        if means is not None and origin is None and mask is not None:
            origin = torch.zeros(1, dtype=torch.int64, device=screen_q.device)
        seen = visibility(screen_q.shape[2], keys, mask, positions, origin, screen_q.device)
        if means is None:
            means = block_means(screen_k.detach(), budget.block_size, seen.origin)
        return Selection(
            _chosen_blocks(screen_q.detach(), means, budget, metric, seen), seen, budget
        )


def _chosen_blocks(
    screen_q: Tensor, means: Tensor, budget: KeyBudget, metric: str, seen: Visibility
) -> Tensor:
    batch, key_heads, blocks, _ = means.shape
    queries = screen_q.shape[2]
    places = _places(seen, budget)
    if chooses_by_triton(means, places):
        from .triton.choosing import choose_blocks

        whole = _whole(seen, budget, blocks)
        return choose_blocks(screen_q, means, seen, whole, budget, metric, places)
    chosen = torch.full(
        (batch, key_heads, queries, places), -1, dtype=torch.int64, device=means.device
    )
    # In float64 the rounding of a product depends so little on its shape that the same rows rank
    # the same in a prefill and in a decoding step. GPUs keep to float32: few have the units.
    dtype = torch.float64 if means.device.type == "cpu" else torch.float32
    means = means.to(dtype if means.dtype != torch.float64 else torch.float64)
    query = screen_q.unflatten(1, (key_heads, -1)).to(means.dtype).mean(2)
    lengths = means.square().sum(-1).unsqueeze(-2) if metric == "distance" else None
    kind = "cpu" if means.device.type == "cpu" else "gpu"
    step = max(1, _ELEMENTS[kind] // max(1, batch * key_heads * blocks))
    for rows in ranges(queries, step):
        part = seen.rows(rows)
        visited = _visited(part, budget, blocks)
        with exact(means.device):
            scores = query[:, :, rows] @ means[:, :, :visited].mT
        if lengths is not None:
            scores = 2.0 * scores - lengths[..., :visited]
        if budget.chosen_blocks > 0 and visited > 0:
            _write_best(scores.float(), part, budget, chosen[:, :, rows])
        chosen[:, :, rows] = _or_all(chosen[:, :, rows], part, budget)
    return chosen


def _write_best(scores: Tensor, seen: Visibility, budget: KeyBudget, chosen: Tensor) -> None:
    """The best blocks of each row into the first places of `chosen`, which hold -1."""
    blocks = scores.shape[3]
    if ranks_by_triton(scores.device, blocks):
        from .triton.ranking import best_blocks

        whole = _whole(seen, budget, blocks)
        best_blocks(scores.contiguous(), seen, whole, budget, chosen)
        return
    best = _best(scores, _choosable(seen, budget, blocks), budget.chosen_blocks)
    chosen[..., : best.shape[3]] = best


def _whole(seen: Visibility, budget: KeyBudget, blocks: int) -> Tensor | None:
    if seen.allowed is None:
        return None
    return whole_blocks(seen.allowed, seen.origin, budget.block_size, blocks)


def _places(seen: Visibility, budget: KeyBudget) -> int:
    """Places for the blocks of a query; those that see all their keys can need more of them."""
    if seen.last.device.type == "cpu" and not torch.compiler.is_compiling():
        short = seen.last - seen.first < budget.dense_length
        if not bool((short & (seen.last >= 0)).any()):
            return budget.chosen_blocks
    return max(budget.chosen_blocks, budget.dense_blocks)


def _visited(seen: Visibility, budget: KeyBudget, blocks: int) -> int:
    """Blocks up to the last window, where that is known without waiting for a device."""
    if seen.last.device.type != "cpu" or torch.compiler.is_compiling():
        return blocks
    before = int(seen.last.max()) - budget.window + 1
    if seen.origin is not None:
        before = before - int(seen.origin.min())
    return min(blocks, max(0, -(-before // budget.block_size)))


def _choosable(seen: Visibility, budget: KeyBudget, blocks: int) -> Tensor:
    """Bool `[B|1, 1, Tq, blocks]`: those that a query sees whole, with a key before its window and
    one that is no sink."""
    size = budget.block_size
    start = size * torch.arange(blocks, device=seen.last.device)
    start = start if seen.origin is None else start + seen.origin[:, None, None]
    first, last = seen.first.unsqueeze(-1), seen.last.unsqueeze(-1)
    fits = (start >= first) & (start + size > first + budget.sinks)
    fits = fits & (start + size <= last + 1) & (start <= last - budget.window)
    if seen.allowed is not None:
        fits = fits & whole_blocks(seen.allowed, seen.origin, size, blocks)
    return fits.unsqueeze(1)


def whole_blocks(allowed: Tensor, origin: Tensor | None, size: int, blocks: int) -> Tensor:
    """Bool `[B|1, Tq|1, blocks]`: blocks all of whose keys are allowed."""
    keys = allowed.shape[-1]
    if origin is None:
        missing = max(0, blocks * size - keys)
        padded = torch.nn.functional.pad(allowed[..., : blocks * size], (0, missing))
    else:
        place = torch.arange(blocks * size, device=allowed.device) + origin[:, None]
        inside = (place < keys)[:, None]
        place = place.clamp(max=keys - 1)[:, None]
        batch = max(place.shape[0], allowed.shape[0])
        padded = allowed.expand(batch, -1, -1)
        padded = padded.gather(2, place.expand(batch, padded.shape[1], -1)) & inside
    return padded.unflatten(-1, (blocks, size)).all(-1)


def _best(scores: Tensor, choosable: Tensor, count: int) -> Tensor:
    """The `count` best blocks of each row of float32 scores, -1 where there are no more. A row's
    depend on no other row, their order included: outputs are summed up in it."""
    blocks = scores.shape[-1]
    count = min(count, blocks)
    if scores.device.type != "cpu" or torch.compiler.is_compiling():
        return _best_of_ranks(scores, choosable, count)
    scores = scores.masked_fill_(~choosable, -float("inf"))
    values, best = scores.topk(min(count + 1, blocks), dim=-1)
    least = values[..., count - 1 : count]
    ties = (values[..., count:] == least) & (least > -float("inf"))
    unclear = ties.any(-1) | values.isnan().any(-1)
    best = best[..., :count].masked_fill(values[..., :count] == -float("inf"), -1)
    if unclear.any():
        choosable = choosable.expand(scores.shape)[unclear]
        best[unclear] = _best_of_ranks(scores[unclear], choosable, count)
    return best


def _best_of_ranks(scores: Tensor, choosable: Tensor, count: int) -> Tensor:
    """The same where scores can be equal: with their block numbers they are not."""
    # Adding 0 makes one zero of two. The bits of a float, those of a negative one reversed, are in
    # the order of the floats.
    bits = (scores + 0.0).view(torch.int32)
    rank = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64) << 32
    rank = rank | torch.arange(scores.shape[-1], device=scores.device)
    rank = rank.masked_fill_(~choosable, _NEVER)
    best = rank.topk(count, dim=-1).values
    return torch.where(best == _NEVER, -1, best & 0xFFFFFFFF)


def _or_all(chosen: Tensor, seen: Visibility, budget: KeyBudget) -> Tensor:
    """The blocks of queries that see few keys: all of them."""
    span = seen.last - seen.first + 1
    everything = _row(span <= budget.dense_length)
    origin = 0 if seen.origin is None else seen.origin[:, None]
    lowest = (seen.first - origin) // budget.block_size
    listed = _row(lowest) + torch.arange(chosen.shape[3], device=chosen.device)
    highest = (seen.last - budget.window - origin) // budget.block_size
    # Floor division keeps what lies before the origin negative, which no block is.
    listed = torch.where(listed <= _row(highest), listed, -1)
    return torch.where(everything, listed, chosen)
