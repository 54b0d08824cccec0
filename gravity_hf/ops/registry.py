"""The operator as torch knows it: schemas, shapes for tracing, and the gradient.

`gravity_hf::attention` works on augmented queries and keys (`chunked.augment`). Being one opaque
operator it may look at mask values to skip keys, which a traced graph could not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blockwise import Problem, attention_backward, attention_forward

# Fields of `blockwise.Problem`, in its order.
_ARGUMENTS = (
    "Tensor q, Tensor k, Tensor v, Tensor strength, Tensor floor, Tensor? key_term, Tensor? mask, "
    "Tensor? seed, str law, bool causal, float dropout_p"
)
_KEY_TERM, _MASK, _COUNT = 5, 6, 11

torch.library.define("gravity_hf::attention", f"({_ARGUMENTS}) -> Tensor")
torch.library.define(
    "gravity_hf::attention_backward",
    f"(Tensor grad, {_ARGUMENTS}, bool mask_needs_grad) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)


# "default": plain torch inside, so one implementation serves every device.
@torch.library.impl("gravity_hf::attention", "default")
def _attention(*arguments: object) -> Tensor:
    return attention_forward(Problem(*arguments))


@torch.library.impl("gravity_hf::attention_backward", "default")
def _attention_backward(grad: Tensor, *arguments: object) -> tuple[Tensor, ...]:
    *problem, mask_needs_grad = arguments
    return tuple(attention_backward(grad, Problem(*problem), mask_needs_grad))


@torch.library.register_fake("gravity_hf::attention")
def _attention_shape(q: Tensor, k: Tensor, v: Tensor, *arguments: object) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


@torch.library.register_fake("gravity_hf::attention_backward")
def _attention_backward_shapes(grad: Tensor, *arguments: object) -> tuple[Tensor, ...]:
    *problem, mask_needs_grad = arguments
    shapes = [tensor.shape for tensor in problem[:_KEY_TERM]]
    key_term, mask = problem[_KEY_TERM], problem[_MASK]
    shapes.append((0,) if key_term is None else key_term.shape)
    results = [grad.new_empty(shape) for shape in shapes]
    if mask is not None and mask_needs_grad:
        return (*results, torch.empty_like(mask, memory_format=torch.contiguous_format))
    return (*results, grad.new_empty(0))


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[: _MASK + 2])
    ctx.options = inputs[_MASK + 2 :]


def _gradient(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[: _MASK + 1]
    results = torch.ops.gravity_hf.attention_backward(
        grad, *ctx.saved_tensors, *ctx.options, needed[_MASK]
    )
    results = [result if need else None for result, need in zip(results, needed, strict=True)]
    return (*results, *[None] * (_COUNT - len(results)))


def _no_second_gradient(*_: object) -> None:
    raise RuntimeError(
        "gravity_attention: expected one differentiation, got a second one; the chunked "
        "implementation has first derivatives only. Use impl='reference'."
    )


torch.library.register_autograd("gravity_hf::attention", _gradient, setup_context=_save)
torch.library.register_autograd("gravity_hf::attention_backward", _no_second_gradient)
