"""Routed sparse attention in Triton. Importing this does not import triton; calling it does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...exporting import is_exporting
from ...triton import triton_refusal
from ..budget import KeyBudget
from ..scores import Score

if TYPE_CHECKING:
    from ..selecting import Selection

# What the kernels hold of a head at a time.
WIDEST = 128
LARGEST_BLOCK = 128
# Scores of a row that `ranking` holds.
MOST_BLOCKS = 4096
# Places of a row that `choosing` keeps in registers, with those for rows that see few keys.
MOST_PLACES = 64
# Queries up to which each one's own keys are gathered: there is no product to share.
FEW_QUERIES = 16
# Query heads to a key-value head that `fused` holds.
MOST_HEADS = 64


def chooses_by_triton(means: Tensor, places: int) -> bool:
    """Whether `choosing.choose_blocks` scores and chooses: on a GPU, of means in float32, where a
    row's places fit."""
    if means.device.type != "cuda" or torch.compiler.is_compiling():
        return False
    served = means.dtype == torch.float32 and means.shape[3] <= WIDEST and places <= MOST_PLACES
    return served and triton_refusal(means.device, torch.float32) is None


def ranks_by_triton(device: torch.device, blocks: int) -> bool:
    """Whether `ranking.best_blocks` chooses: on a GPU, of no more blocks than it can hold."""
    if device.type != "cuda" or torch.compiler.is_compiling():
        return False
    return blocks <= MOST_BLOCKS and triton_refusal(device, torch.float32) is None


def routed_refusal(
    q: Tensor, k: Tensor, v: Tensor, score: Score, selection: Selection, dropout_p: float
) -> str | None:
    """What a call would have to be for the kernels to serve it; None: they can."""
    refusal = triton_refusal(q.device, q.dtype, None, max(q.shape[3], v.shape[3]))
    if refusal is not None:
        return f"a call that triton serves ({refusal})"
    if dropout_p > 0:
        return f"dropout_p = 0, got {dropout_p}"
    allowed = selection.visible.allowed
    if selection.visible.bias is not None or (allowed is not None and allowed.shape[1] > 1):
        return "causality and key padding as its only mask"
    if max(q.shape[3], v.shape[3]) > WIDEST:
        return f"heads at most {WIDEST} wide"
    if selection.budget.block_size > LARGEST_BLOCK:
        return f"blocks of at most {LARGEST_BLOCK} keys"
    return None


def triton_routed_attention(
    q: Tensor, k: Tensor, v: Tensor, score: Score, selection: Selection, dropout_p: float = 0.0
) -> Tensor:
    """See `attention.routed_attention`.

    Raises:
        ValueError: what `routed_refusal` says.
    """
    refusal = routed_refusal(q, k, v, score, selection, dropout_p)
    if refusal is not None:
        raise ValueError(f"sparse_attention: impl='triton': expected {refusal}. Use impl='auto'")
    from .attention import routed_attention

    return routed_attention(q, k, v, score, selection)


def fused_refusal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Score,
    budget: KeyBudget,
    screen: tuple[Tensor, Tensor],
    means: Tensor | None,
    hidden: bool,
    dropout_p: float,
) -> str | None:
    """What a call would have to be for `fused` to serve it; None: it can. `hidden`: whether it has
    a mask, positions or an origin."""
    queries, keys = q.shape[2], k.shape[2]
    width = max(q.shape[3], v.shape[3], screen[0].shape[3])
    refusal = triton_refusal(q.device, q.dtype, None, width)
    if refusal is not None:
        return f"a call that triton serves ({refusal})"
    if torch.compiler.is_compiling() or is_exporting():
        return "no graph that is being traced"
    tensors = (q, k, v, *score.tensors)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "no gradient: call it under torch.no_grad()"
    if hidden or dropout_p > 0:
        return "causality as its only mask, and dropout_p = 0"
    if queries > FEW_QUERIES:
        return f"at most {FEW_QUERIES} queries, got {queries}"
    if keys - queries + 1 <= budget.dense_length:
        return f"queries that all see more than {budget.dense_length} keys"
    if width > WIDEST or q.shape[1] // k.shape[1] > MOST_HEADS:
        return f"heads at most {WIDEST} wide, {MOST_HEADS} to a key-value head"
    blocks = -(-keys // budget.block_size) if means is None else means.shape[2]
    if budget.block_size > LARGEST_BLOCK or blocks > MOST_BLOCKS:
        return f"at most {MOST_BLOCKS} blocks, of at most {LARGEST_BLOCK} keys"
    return None


def triton_fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Score,
    budget: KeyBudget,
    screen: tuple[Tensor, Tensor],
    means: Tensor | None,
) -> Tensor:
    """See `fused.fused_attention`."""
    from .fused import fused_attention

    return fused_attention(q, k, v, score, budget, screen, means)
