"""What a choice of keys keeps of dense attention, and what it costs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .reference import selected_weights
from .scores import Score
from .selecting import Selection


class SelectionStatistics(NamedTuple):
    """recall: of the weights of dense attention, the sum over the selected keys, `[H]`, averaged
    over queries that see a key. pair_fraction: selected pairs, of the visible ones. cost_fraction:
    these plus the screening in the same unit: a screening score of width `ds`, one for each block
    and key-value head, counts as `ds / D` of a pair and is shared by the query heads. All float32
    but in float64 calls; scalars but recall."""

    recall: Tensor
    pair_fraction: Tensor
    cost_fraction: Tensor


@torch.no_grad()
def selection_statistics(
    q: Tensor,
    k: Tensor,
    score: Score,
    selection: Selection,
    *,
    screen_dim: int | None = None,
    rows: int | None = 256,
    generator: torch.Generator | None = None,
) -> SelectionStatistics:
    """Shapes as in `sparse_attention`; nothing waits for the device.

    Args:
        screen_dim: `ds`; None: the width of q.
        rows: queries that are looked at, drawn without replacement; None: all. Memory is that of
            their dense weights, `[B, H, rows, Tk]`.
    """
    drawn = draw_rows(q.shape[2], rows, generator, q.device)
    if drawn is not None:
        q, selection = q[:, :, drawn], selection.rows(drawn)
    selected, seen = selection.mask(), selection.visible
    visible = seen.mask()
    weights = selected_weights(q, k, score, visible, seen.bias)
    kept = (weights * selected.unsqueeze(2)).sum(-1)
    alive = visible.any(-1).expand(q.shape[0], 1, -1).to(kept.dtype)
    recall = kept.sum((0, 3)) / alive.sum().clamp(min=1.0)
    groups = q.shape[1] // k.shape[1]
    pairs = visible.expand(q.shape[0], k.shape[1], -1, -1).sum().to(kept.dtype)
    fraction = selected.sum().to(kept.dtype) / pairs.clamp(min=1.0)
    width = q.shape[3] if screen_dim is None else screen_dim
    screening = width / (q.shape[3] * groups * selection.budget.block_size)
    return SelectionStatistics(recall.flatten(), fraction, fraction + screening)


def draw_rows(
    queries: int, rows: int | None, generator: torch.Generator | None, device: torch.device
) -> Tensor | None:
    """int64 `[rows]`, rising; None where that is all of them."""
    if rows is None or rows >= queries:
        return None
    where = device if generator is None else generator.device
    drawn = torch.randperm(queries, generator=generator, device=where)[:rows]
    return drawn.sort().values.to(device)
