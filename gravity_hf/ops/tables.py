"""Forward and backward of attention whose heads share one distance: `shared.SharedProblem`.

Few passes over few scores: what costs time for a short sequence is the number of operations, and
for a long one that a block of scores leaves the cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .precision import exact_products
from .problem import stack
from .reference import SELF_SCORE
from .shared import Base, Part, Rows, SharedProblem
from .space import Space

# Fields of `SharedProblem` that get a gradient, in the order of the operator's results.
DIFFERENTIABLE = ("q", "k", "v", "strength", "key_term", "table")


def shared_forward(problem: SharedProblem) -> Tensor:
    """Output `[B, H, Tq, Dv]`, laid out in memory as `[B, Tq, H, Dv]`."""
    output, untouched = output_of(problem), True
    space = Space(problem.v)
    with exact_products(problem.v.device):
        for block in problem.blocks():
            base = problem.base(block)
            for part in problem.parts(block):
                room = space.take("weights", problem.shape(block, part))
                weights, _ = _weights(problem, block, part, base, room)
                result = torch.bmm(stack(weights), _values(problem.v, block, part))
                result = result.view(*weights.shape[:-1], -1)
                if block.window.dead is not None:
                    result.masked_fill_(_of_part(block.window.dead, part), 0.0)
                if part.whole:
                    return output.copy_(result.flatten(1, 2))
                if untouched:
                    out, untouched = output.zero_().unflatten(1, problem.sizes[1:3]), False
                out[part.batch, part.heads, :, block.rows] = result
    return output.zero_() if untouched else output


def shared_backward(grad: Tensor, problem: SharedProblem, needed: list[bool]) -> list[Tensor]:
    """Gradients of the fields `DIFFERENTIABLE`; empty where there is nothing or none is needed."""
    grads = _zeros(problem, needed)
    grad = grad.unflatten(1, problem.sizes[1:3])
    of_base = needed[0] or needed[1] or needed[5]
    space = Space(problem.v)
    with exact_products(problem.v.device):
        for block in problem.blocks():
            base = problem.base(block)
            base_grad = problem.base_gradient(block, base, grads) if of_base else None
            for part in problem.parts(block):
                shape = problem.shape(block, part)
                first, second = space.take("weights", shape), space.take("gradient", shape)
                weights, capped = _weights(problem, block, part, base, first, differentiable=True)
                grad_out = grad[part.batch, part.heads, :, block.rows]
                if block.window.dead is not None:
                    grad_out = grad_out.masked_fill(_of_part(block.window.dead, part), 0.0)
                grad_out = stack(grad_out)
                torch.bmm(grad_out, _values(problem.v, block, part).mT, out=stack(second))
                _values(grads["v"], block, part).baddbmm_(stack(weights).mT, grad_out)
                # second becomes weights * (second - sum_j weights * second), dL/dscore.
                torch._softmax_backward_data(second, weights, -1, second.dtype, grad_input=second)
                if capped is not None:
                    _through_cap(problem, capped, second)
                _through_law(problem, block, part, base, second, weights, grads, base_grad)
            if base_grad is not None:
                problem.differentiate_base(block, base, base_grad, grads)
    return _results(problem, grads, needed)


def output_of(problem: SharedProblem) -> Tensor:
    """Room `[B, H, Tq, Dv]`, laid out in memory as `[B, Tq, H, Dv]`: what merges heads next need
    not copy it."""
    batch, key_heads, groups, queries, _ = problem.sizes
    room = problem.v.new_empty(batch, queries, key_heads * groups, problem.v.shape[3])
    return room.transpose(1, 2)


def room_of(problem: SharedProblem, name: str) -> Tensor:
    """Room for the gradient of a field. That of v is laid out as `[B, N, Dv, Tk]`, in which the
    products that it is a sum of are faster by a third."""
    value = getattr(problem, name)
    if name == "v":
        return value.new_empty(value.mT.shape).mT
    return value.new_empty(value.shape)


def _weights(
    problem: SharedProblem,
    block: Rows,
    part: Part,
    base: Base,
    out: Tensor,
    *,
    differentiable: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The part's weights into `out`, and what `_through_cap` needs."""
    value, window = _of_part(base.value, part), block.window
    strength, key = problem.row_factors, problem.key_columns
    if not part.whole:
        strength = strength[part.batch, part.heads, :, block.rows]
        key = None if key is None else key[part.batch, part.heads, :, :, window.keys]
    if key is None:
        torch.mul(value, strength, out=out)
    elif problem.law == "power":
        torch.mul(value, strength, out=out).add_(key)
    else:
        torch.mul(value, key, out=out).mul_(strength)
    capped = None
    if problem.max_force is not None:
        capped = _cap(problem, out, differentiable)
    if problem.exclude_self:
        offset = block.rows.start + problem.sizes.keys - problem.sizes.queries - window.keys.start
        out.diagonal(offset, -2, -1).fill_(SELF_SCORE)
    if window.bias is not None:
        hidden = window.bias_keys
        tail = out.narrow(-1, hidden.start, hidden.stop - hidden.start)
        tail.add_(_of_part(window.bias, part))
    return torch.softmax(out, -1, out=out), capped


def _cap(problem: SharedProblem, score: Tensor, differentiable: bool) -> Tensor | None:
    """The ceiling, in place. Returns the `tanh` of a smooth one, or 0 where the score exceeded it
    and 1 elsewhere; None where a CPU sees at a glance that it did nowhere."""
    limit = problem.max_force
    if problem.smooth_cap:
        bend = score.div_(limit).tanh_()
        bend = bend.clone() if differentiable else None
        score.mul_(limit)
        return bend
    capped = None
    if differentiable:
        if score.device.type == "cpu" and score.amax().item() <= limit:
            return None
        # In the scores' dtype: on a CPU a mask of bools costs as much as two products.
        capped = score.clone().le_(limit)
    score.clamp_(max=limit)
    return capped


def _through_cap(problem: SharedProblem, capped: Tensor, grad: Tensor) -> None:
    if problem.smooth_cap:
        grad.mul_(capped.square_().neg_().add_(1.0))
    else:
        grad.mul_(capped)


def _through_law(
    problem: SharedProblem,
    block: Rows,
    part: Part,
    base: Base,
    grad: Tensor,
    spare: Tensor,
    grads: dict[str, Tensor],
    base_grad: Tensor | None,
) -> None:
    """From dL/dscore, which is overwritten like `spare`, to strength, key terms and the base."""
    batch, heads, rows, keys = part.batch, part.heads, block.rows, block.window.keys
    strength, columns = problem.row_factors[batch, heads, :, rows], problem.key_columns
    is_factor = columns is not None and problem.law != "power"
    if columns is not None:
        columns = columns[batch, heads, :, :, keys]
        key_total = grads["key_term"][batch, heads, :, :, keys]
        if not is_factor:
            key_total.add_(grad.sum(3, keepdim=True))
    product = torch.mul(grad, _of_part(base.value, part), out=spare)
    strength_rows = grads["strength"][batch, heads, :, rows]
    if is_factor:
        merged, vector = product.flatten(0, 2), columns.flatten(0, 2).mT
        strength_rows.copy_(torch.bmm(merged, vector).view(strength_rows.shape))
        key_total.add_(product.mul_(strength).sum(3, keepdim=True))
    else:
        strength_rows.copy_(product.sum(-1, keepdim=True))
    if base_grad is not None:
        grad.mul_(strength)
        if is_factor:
            grad.mul_(columns)
        _add_heads(_of_part(base_grad, part), grad)


def _add_heads(total: Tensor, grad: Tensor) -> None:
    """To `total` `[b|1, 1, 1, rows, keys]` what all heads of `grad` have."""
    heads = grad.shape[0] * grad.shape[1] * grad.shape[2]
    if heads <= 4 and total.shape[0] == 1:
        # A sum over few heads is slower than additions, and needs memory.
        for part in grad.flatten(0, 2):
            total.add_(part)
    else:
        total.add_(grad.sum((1, 2) if total.shape[0] > 1 else (0, 1, 2)).view_as(total))


def _values(tensor: Tensor, block: Rows, part: Part) -> Tensor:
    """The part of a tensor like v as `[b * n, keys, Dv]`; a view where the layout allows it."""
    if not part.whole:
        tensor = tensor[part.batch, part.heads, block.window.keys]
    return tensor.flatten(0, 1)


def _of_part(tensor: Tensor, part: Part) -> Tensor:
    """The part of a tensor `[B|1, N|1, ...]`."""
    batch, heads = tensor.shape[:2]
    if part.whole or (batch == 1 and heads == 1):
        return tensor
    whole = slice(None)
    return tensor[part.batch if batch > 1 else whole, part.heads if heads > 1 else whole]


def _zeros(problem: SharedProblem, needed: list[bool]) -> dict[str, Tensor]:
    """Gradients so far, by field; of strength and key terms as the problem cuts them."""
    batch, key_heads, groups, queries, keys = problem.sizes
    grads = {
        "v": room_of(problem, "v").zero_(),
        "strength": problem.v.new_zeros(batch, key_heads, groups, queries, 1),
    }
    if problem.key_term is not None:
        grads["key_term"] = problem.v.new_zeros(batch, key_heads, groups, 1, keys)
    if problem.table is not None and needed[5]:
        grads["table"] = room_of(problem, "table").zero_()
    if problem.table is None and (needed[0] or needed[1]):
        grads["q"], grads["k"] = (room_of(problem, name).zero_() for name in "qk")
    return grads


def _results(problem: SharedProblem, grads: dict[str, Tensor], needed: list[bool]) -> list[Tensor]:
    results = []
    for name, need in zip(DIFFERENTIABLE, needed, strict=True):
        value = getattr(problem, name)
        if value is None or not need:
            results.append(problem.v.new_empty(0))
        elif name in ("strength", "key_term"):
            grad = grads[name].squeeze(-1 if name == "strength" else -2).flatten(1, 2)
            results.append(grad.sum_to_size(value.shape))
        else:
            results.append(grads[name])
    return results
