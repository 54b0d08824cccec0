"""Counting floating-point operations, fused attention included.

torch's own counter knows attention on a GPU, in some versions only with as many key-value heads as
query heads, and leaves out the kernel of the CPU. These formulas take the place of its own there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

_KERNELS = (
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)
Shape = Sequence[int]


def flop_counter() -> FlopCounterMode:
    """A context that counts what is computed inside; two operations for a multiplication and its
    addition. Masks save nothing of it, as a causal one saves nothing in a matrix product."""
    return FlopCounterMode(display=False, custom_mapping=_formulas())


def attention_flops(query: Shape, key: Shape, value: Shape, *others: Any, **options: Any) -> int:
    """Of fused attention: `q k^T` and `p v`.

    Args:
        query: shape `[..., H, Tq, d]`.
        key: shape `[..., G, Tk, d]`; each of the `G` heads serves `H / G` of the query's.
        value: shape `[..., G, Tk, dv]`.
        others: the operator's other arguments; nothing depends on them.
        options: as `others`.
    """
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def attention_backward_flops(
    gradient: Shape, query: Shape, key: Shape, value: Shape, *others: Any, **options: Any
) -> int:
    """Of its backward, which computes `q k^T` anew: that, the gradients of `q` and `k`, and those
    of `p` and `v`. Arguments as of `attention_flops`, after the gradient of the output."""
    return 2 * math.prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


def _formulas() -> dict[Any, Callable[..., int]]:
    found: dict[Any, Callable[..., int]] = {}
    for name in _KERNELS:
        # Not every build of torch has every kernel.
        for suffix, formula in (("", attention_flops), ("_backward", attention_backward_flops)):
            operator = getattr(torch.ops.aten, f"{name}{suffix}", None)
            if operator is not None:
                found[operator] = formula
    return found
