"""Routed sparse attention in Triton. Importing this does not import triton; calling it does."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...triton import triton_refusal
from ..scores import Score

if TYPE_CHECKING:
    from ..selecting import Selection

# What the kernels hold of a head at a time.
WIDEST = 128
LARGEST_BLOCK = 128
# Scores of a row that `ranking` holds.
MOST_BLOCKS = 4096


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
    tensors = (q, k, v, *score.tensors)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "no gradient: call it under torch.no_grad()"
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
