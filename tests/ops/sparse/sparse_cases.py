"""Inputs of sparse attention, shared by its tests."""

from __future__ import annotations

import torch
from torch import Tensor

from gravity_hf.ops.sparse import DotProduct, Gravity, KeyBudget

BATCH, HEADS, KEY_HEADS, LENGTH, WIDTH = 2, 4, 2, 150, 8
SCORES = ("dot", "power", "force", "lifted")
MASKS = ("none", "left", "right", "holes", "documents", "additive")


def budget(block_size: int = 8, **changes: int) -> KeyBudget:
    return KeyBudget(**{"top_k": 40, "block_size": block_size, "window": 10, "sinks": 2, **changes})


def vectors(
    queries: int = LENGTH, keys: int = LENGTH, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = [(HEADS, queries), (KEY_HEADS, keys), (KEY_HEADS, keys)]
    return tuple(torch.randn(BATCH, *x, WIDTH, generator=g, dtype=dtype) for x in shapes)


def score_of(name: str, dtype: torch.dtype = torch.float32) -> DotProduct | Gravity:
    if name == "dot":
        return DotProduct(0.7)
    g = torch.Generator().manual_seed(3)
    mass, softening = (0.5 + torch.rand(HEADS, generator=g, dtype=dtype) for _ in range(2))
    radius = torch.tensor([40.0, 45.0], dtype=dtype) if name == "lifted" else None
    return Gravity(mass, softening, "force" if name == "force" else "power", radius)


def as_double(score: DotProduct | Gravity) -> DotProduct | Gravity:
    if isinstance(score, DotProduct):
        return score
    radius = None if score.key_radius_sq is None else score.key_radius_sq.double()
    return Gravity(score.mass.double(), score.softening.double(), score.law, radius)


def mask_of(name: str, queries: int = LENGTH, keys: int = LENGTH) -> Tensor | None:
    """Key padding `[B, Tk]`, or bool or float `[B, 1, Tq, Tk]`."""
    if name == "none":
        return None
    padding = torch.ones(BATCH, keys, dtype=torch.bool)
    if name == "left":
        padding[1, : keys // 4] = False
    if name == "right":
        padding[1, -keys // 4 :] = False
    if name == "holes":
        padding = torch.rand(BATCH, keys, generator=torch.Generator().manual_seed(5)) > 0.1
    if name in ("left", "right", "holes"):
        return padding
    document = (torch.arange(keys) > keys // 3).long() + (torch.arange(keys) > keys // 2)
    seen = (document[-queries:, None] == document).tril(keys - queries)
    seen = seen.expand(BATCH, 1, queries, keys).clone()
    # A row that sees nothing.
    seen[0, 0, queries // 2] = False
    if name == "documents":
        return seen
    bias = torch.randn(seen.shape, generator=torch.Generator().manual_seed(6))
    return bias.masked_fill(~seen, torch.finfo(bias.dtype).min)


def visible(name: str, queries: int = LENGTH, keys: int = LENGTH) -> Tensor:
    """Bool `[B, 1, Tq, Tk]`: what a mask and causality leave."""
    causal = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
    mask = mask_of(name, queries, keys)
    if mask is None:
        return causal.expand(BATCH, 1, -1, -1)
    if mask.dim() == 2:
        return causal & mask[:, None, None]
    return causal & (mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)
