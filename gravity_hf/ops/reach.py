"""Which blocks of queries and keys a hard cutoff lets see each other, from a sphere round each.

A pair is at least as far apart as the spheres that hold it, so two blocks whose spheres are further
from each other than the radius have no visible pair. Nothing here waits for a device.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Spheres(NamedTuple):
    """Round each block of consecutive tokens: `centre` `[B, H, n, D]`, `radius` `[B, H, n]`, and
    `length` `[B, H, n]`, which no vector in the sphere exceeds."""

    centre: Tensor
    radius: Tensor
    length: Tensor


def spheres(vectors: Tensor, block: int) -> Spheres:
    """Of `vectors` `[B, H, T, D]` in blocks of `block` tokens, the last one of what is left.

    float64 for float64 vectors, float32 for all others.
    """
    if vectors.dtype != torch.float64:
        vectors = vectors.float()
    missing = -vectors.shape[2] % block
    if missing:
        last = vectors[:, :, -1:].expand(-1, -1, missing, -1)
        vectors = torch.cat([vectors, last], 2)
    blocks = vectors.unflatten(2, (-1, block))
    centre = blocks.mean(3)
    radius = torch.linalg.vector_norm(blocks - centre.unsqueeze(3), dim=-1).amax(-1)
    return Spheres(centre, radius, torch.linalg.vector_norm(centre, dim=-1) + radius)


def blocks_in_reach(q: Tensor, k: Tensor, radius: Tensor, block_q: int, block_k: int) -> Tensor:
    """Bool `[B, H, ceil(Tq / block_q), ceil(Tk / block_k)]`: False only where no query of the one
    block has a key of the other within `radius`.

    What counts is the distance as it is computed, `|q|^2 + |k|^2 - 2 q.k` in float32 (float64 for
    float64): a bound on its rounding error is left as a margin, so that no visible pair is lost.
    True proves nothing. Distances that are not numbers are in reach.

    Args:
        q: `[B, H, Tq, D]`, Tq > 0.
        k: `[B, Hkv, Tk, D]`, Tk > 0; not lifted keys, whose distances are others.
        radius: `[H]`, as in `gravity_hf.ops.cutoff.Cutoff`.
    """
    of_queries, of_keys = spheres(q.detach(), block_q), spheres(k.detach(), block_k)
    return spheres_in_reach(of_queries, of_keys, radius.detach(), q.shape[3])


def spheres_in_reach(queries: Spheres, keys: Spheres, radius: Tensor, width: int) -> Tensor:
    """`blocks_in_reach` from the spheres of its blocks; `width`: D."""
    groups = queries.centre.shape[1] // keys.centre.shape[1]
    if groups > 1:
        keys = Spheres(*(x.repeat_interleave(groups, 1) for x in keys))
    # By differences: products would lose what the margin is to hold.
    between = torch.cdist(queries.centre, keys.centre, compute_mode="donot_use_mm_for_euclid_dist")
    gap = between - queries.radius.unsqueeze(-1) - keys.radius.unsqueeze(-2)
    longest = queries.length.unsqueeze(-1) + keys.length.unsqueeze(-2)
    # Rounding errors are relative to lengths: sums of `width` products, and a few more of centres,
    # radii and what they are compared with.
    unit = 4 * (width + 8) * torch.finfo(gap.dtype).eps
    limit = radius.to(gap.dtype).square()[:, None, None] + unit * longest.square()
    return ~((gap > 0) & (gap.square() > limit))
