"""Forward and backward of `softmax(score) v`, one block of scores at a time.

Memory is linear in length: scores exist for one block, `[b, n, G, rows, keys]`, and the backward
computes them again. Formulas: README.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import Block, cut, mask_5d
from .precision import exact_products
from .problem import Problem, stack
from .score_gradients import differentiate_scores
from .scores import block_scores
from .sinks import differentiate_sink
from .softcap import add_neutral, differentiate_softcap
from .space import Space

# Fields of `Problem` that get a gradient, in the order of the operator's results.
DIFFERENTIABLE = (
    "q",
    "k",
    "v",
    "strength",
    "eps",
    "offset",
    "key_term",
    "radius_sq",
    "table",
    "sink",
    "mask",
)


def attention_forward(problem: Problem) -> Tensor:
    """Output `[B, H, Tq, Dv]`."""
    output = problem.per_query(problem.v.shape[3])
    generator, space = problem.generator(), Space(problem.v)
    with exact_products(problem.v.device):
        for block in problem.blocks():
            scores = block_scores(problem, block, space, differentiable=False)
            weights = scores.weights
            if problem.dropout_p > 0:
                weights.mul_(problem.keep(weights, generator))
            result = torch.bmm(stack(weights), problem.keys_of(problem.v, block))
            result = result.view(*weights.shape[:-1], -1)
            if scores.dead is not None:
                result.masked_fill_(scores.dead, 0.0)
            problem.rows_of(output, block).copy_(result)
    return output


def attention_backward(grad: Tensor, problem: Problem, mask_needs_grad: bool) -> list[Tensor]:
    """Gradients of the fields `DIFFERENTIABLE`; empty where there is nothing."""
    grads = _zeros(problem, mask_needs_grad)
    generator, space = problem.generator(), Space(problem.v)
    with exact_products(problem.v.device):
        for block in problem.blocks():
            scores = block_scores(problem, block, space, differentiable=True)
            weights = scores.weights
            grad_out = problem.rows_of(grad, block)
            if scores.dead is not None:
                grad_out = grad_out.masked_fill(scores.dead, 0.0)
            grad_out = stack(grad_out)
            grad_s = space.take("gradient", weights.shape)
            torch.bmm(grad_out, problem.keys_of(problem.v, block).mT, out=stack(grad_s))
            kept = weights
            if problem.dropout_p > 0:
                keep = problem.keep(weights, generator)
                kept = keep * weights
                grad_s.mul_(keep)
            problem.add_to_keys(grads["v"], block, stack(kept).mT, grad_out)
            if problem.sink is not None:
                part = differentiate_sink(weights, scores.sink_weight, grad_s)
                problem.rows_of(grads["sink"], block).copy_(part)
            # grad_s becomes weights * (grad_s - sum_j weights * grad_s).
            torch._softmax_backward_data(grad_s, weights, -1, grad_s.dtype, grad_input=grad_s)
            if "mask" in grads:
                part = mask_5d(grads["mask"], problem.sizes)
                slices = (block.batch, block.heads, slice(None), block.rows, block.window.keys)
                part = cut(part, *slices)
                part += grad_s.sum_to_size(part.shape)
            neutral = None
            if problem.softcap is not None:
                neutral = differentiate_softcap(problem, block, scores.bend, grad_s)
            turn = differentiate_scores(problem, block, scores, grad_s, grads)
            if problem.table is None:
                _through_product(problem, block, grad_s, turn, grads)
            if neutral is not None:
                add_neutral(problem, block, neutral, grads)
    return _results(problem, grads)


def _through_product(
    problem: Problem, block: Block, grad: Tensor, turn: Tensor | None, grads: dict[str, Tensor]
) -> None:
    """Gradients of q' and k' from `grad * turn`, that of their product."""
    queries = problem.rows_of(problem.q, block)
    turned = stack(queries if turn is None else queries * turn)
    problem.add_to_keys(grads["k"], block, stack(grad).mT, turned)
    part = problem.rows_of(grads["q"], block)
    result = torch.bmm(stack(grad), problem.keys_of(problem.k, block)).view(part.shape)
    # Ones in k' make the last column a row sum, of terms that nearly cancel: a reduction loses
    # fewer digits of it than a product does.
    torch.sum(grad, -1, out=result[..., -1])
    if turn is None:
        part.copy_(result)
    else:
        torch.mul(result, turn, out=part)


def _zeros(problem: Problem, mask_needs_grad: bool) -> dict[str, Tensor]:
    grads = {}
    for name in DIFFERENTIABLE:
        value = getattr(problem, name)
        if value is None or (name == "mask" and not mask_needs_grad):
            continue
        per_query = name in ("strength", "offset")
        # The mask has a dtype of its own; its gradient is summed in that of the scores.
        grads[name] = problem.per_query() if per_query else problem.v.new_zeros(value.shape)
    return grads


def _results(problem: Problem, grads: dict[str, Tensor]) -> list[Tensor]:
    results = []
    for name in DIFFERENTIABLE:
        value, grad = getattr(problem, name), grads.get(name)
        if grad is None:
            results.append(problem.v.new_empty(0))
        else:
            results.append(grad.sum_to_size(value.shape).to(value.dtype))
    return results
