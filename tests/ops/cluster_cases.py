"""Coordinates in clusters far from each other, of which a hard cutoff leaves few pairs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gravity_hf.ops import blocks, near_blocks

# Tokens of a cluster stand together, `RUN` of them; a cluster may come back.
RUN, WIDTH = 8, 6


def clusters(order: list[int], *, batch: int = 2, heads: int = 2, seed: int = 0) -> Tensor:
    """`[B, H, RUN * len(order), WIDTH]` in float64: cluster `order[n]` has the n-th run. Distances
    are below 4 in a cluster and above 10 between two."""
    g = torch.Generator().manual_seed(seed)
    near = torch.randn(batch, heads, RUN * len(order), WIDTH, generator=g, dtype=torch.float64)
    # Clusters are corners of a cube, in another corner for each head.
    bits = torch.tensor([[(n >> bit) & 1 for bit in range(WIDTH)] for n in order])
    corners = torch.stack([bits.roll(head, 1) for head in range(heads)]) * 14.0
    return 0.3 * near.clamp(-2, 2) + corners.repeat_interleave(RUN, 1)


def ngt_call(x: Tensor, *, law: str = "force", seed: int = 1) -> dict[str, Any]:
    """What a Newton Gravity Transformer calls with coordinates `x`; `tests/ops/operator_cases.run`
    takes it."""
    g = torch.Generator().manual_seed(seed)
    batch, heads, length, _ = x.shape

    def uniform(*shape: int) -> Tensor:
        return 0.5 + torch.rand(*shape, generator=g, dtype=torch.float64)

    inputs = {"q": x, "k": x.clone(), "v": uniform(batch, heads, length, 3) - 1.0}
    inputs |= {"mass": uniform(heads), "eps": uniform(heads), "radius": 5 * uniform(heads)}
    inputs["key_mass"] = uniform(batch, heads, length)
    if law == "force":
        inputs |= {"query_mass": uniform(batch, heads, length), "head_bias": uniform(heads)}
    return inputs


def small_blocks(monkeypatch: Any) -> None:
    """Blocks of 4 queries and 4 keys, left out at any length wherever they are out of reach."""
    monkeypatch.setitem(blocks.ROWS_MASKED, "cpu", 4)
    monkeypatch.setattr(near_blocks, "KEYS", 4)
    monkeypatch.setattr(near_blocks, "SHORTEST", 1)
