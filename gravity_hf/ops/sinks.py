"""A sink in a block of scores: one more key, whose value is zero, in the sum of the weights."""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import Block
from .problem import Problem


def softmax_beside_sink(problem: Problem, block: Block, score: Tensor) -> Tensor:
    """Softmax of `score` `[b, n, G, rows, keys]` in place, over the keys and the row's sink.

    Returns:
        The sink's weight `[b, n, G, rows, 1]`.
    """
    sink = problem.rows_of(problem.sink, block).unsqueeze(-1)
    top = score.amax(-1, keepdim=True)
    weights = torch.softmax(score, -1, out=score)
    # The largest weight is 1 over the sum of exp(score - top).
    above = top - weights.amax(-1, keepdim=True).log_() - sink
    weights.mul_(torch.sigmoid(above))
    return torch.sigmoid_(above.neg_())


def differentiate_sink(weights: Tensor, sink_weight: Tensor, grad: Tensor) -> Tensor:
    """dL/d(sink's score) `[b, n, G, rows]` from dL/dweight of the keys.

    The sink's value is zero, so its own dL/dweight is, and of the softmax's derivative is left
    `-w_sink sum_j w_j dL/dw_j`.
    """
    return (weights * grad).sum(-1).mul_(sink_weight.squeeze(-1)).neg_()
