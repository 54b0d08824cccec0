"""Ranges of keys per query, the form in which padding and packed documents reach the operator.

`key_ranges` int32 `[B|1, Tq|1, 2]`: query i sees keys `start_i <= j < stop_i`; starts and stops do
not decrease along the queries. Nothing here waits for a device.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ranges_from_cu_seqlens(cu_seqlens: Tensor, total: int) -> Tensor:
    """Key ranges `[1, total, 2]` of documents packed one after another.

    Document n holds the tokens `cu_seqlens[n] <= t < cu_seqlens[n + 1]`. Empty documents are fine,
    so lists padded by repeating the last entry are; a token of no document sees nothing.

    Args:
        cu_seqlens: integers `[N + 1]`, not decreasing.
        total: number of tokens.
    """
    tokens = torch.arange(total, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    following = torch.searchsorted(cu_seqlens, tokens, right=True)
    last = cu_seqlens.shape[0] - 1
    start = cu_seqlens[(following - 1).clamp(min=0)]
    stop = cu_seqlens[following.clamp(max=last)]
    return torch.stack([start, stop], -1).to(torch.int32)[None]
