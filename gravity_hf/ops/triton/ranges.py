"""Key ranges turned round: which queries see a key."""

from __future__ import annotations

import torch
from torch import Tensor


def query_ranges(key_ranges: Tensor, queries: int, keys: int) -> Tensor:
    """The inverse of key ranges: int32 `[B|1, Tk, 2]`, for each key the first query whose range
    holds it and one past the last (first == last where there is none).

    Args:
        key_ranges: `[B|1, Tq|1, 2]`; one row stands for all queries.
        queries: `Tq`.
        keys: `Tk`.
    """
    batch = key_ranges.shape[0]
    start, stop = key_ranges.expand(batch, queries, 2).unbind(-1)
    key = torch.arange(keys, dtype=key_ranges.dtype, device=key_ranges.device)
    key = key.expand(batch, keys).contiguous()
    # Both are sorted: rows with start <= j are a head of the rows, those with stop <= j too.
    begun = torch.searchsorted(start.contiguous(), key, right=True, out_int32=True)
    ended = torch.searchsorted(stop.contiguous(), key, right=True, out_int32=True)
    return torch.stack([ended, torch.maximum(begun, ended)], -1)
