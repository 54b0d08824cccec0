"""`tables.py` as torch knows it: schemas, shapes for tracing, and the gradient.

Outside tracers `shared_attention` goes round the dispatcher, whose way through Python costs a short
sequence as much as its attention does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .registry import is_observed, no_second_gradient, refuse_tangents
from .shared import SharedProblem
from .tables import DIFFERENTIABLE, output_of, room_of, shared_backward, shared_forward

# Fields of `shared.SharedProblem`, in its order.
_ARGUMENTS = (
    "Tensor? q, Tensor? k, Tensor v, Tensor strength, Tensor? key_term, Tensor? table, "
    "Tensor? mask, Tensor? key_ranges, str law, bool causal, int? window, bool exclude_self, "
    "float? max_force, bool smooth_cap, float eps, float? curvature_kappa, float horizon"
)
_ALL = _ARGUMENTS.count(",") + 1
_TENSORS = _ARGUMENTS.count("Tensor")
_COUNT = len(DIFFERENTIABLE)

torch.library.define("gravity_hf::shared_attention", f"({_ARGUMENTS}) -> Tensor")
torch.library.define(
    "gravity_hf::shared_attention_backward",
    f"(Tensor grad, {_ARGUMENTS}, bool[] needed) -> ({', '.join(['Tensor'] * _COUNT)})",
)


def shared_attention(*arguments: object) -> Tensor:
    """`arguments`: the fields of `SharedProblem`. Output `[B, H, Tq, Dv]`."""
    tensors = [x for x in arguments[:_TENSORS] if x is not None]
    if torch.compiler.is_compiling() or is_observed(tensors):
        refuse_tangents(tensors)
        return torch.ops.gravity_hf.shared_attention(*arguments)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return _Shared.apply(*arguments)
    return shared_forward(SharedProblem(*arguments))


class _Shared(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: object) -> Tensor:
        return shared_forward(SharedProblem(*arguments))

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor):
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
        return _gradient(ctx, grad)


# "default": plain torch inside, so one implementation serves every device.
@torch.library.impl("gravity_hf::shared_attention", "default")
def _attention(*arguments: object) -> Tensor:
    return shared_forward(SharedProblem(*arguments))


@torch.library.impl("gravity_hf::shared_attention_backward", "default")
def _attention_backward(grad: Tensor, *arguments: object) -> tuple[Tensor, ...]:
    *fields, needed = arguments
    return tuple(shared_backward(grad, SharedProblem(*fields), needed))


@torch.library.register_fake("gravity_hf::shared_attention")
def _attention_shape(*arguments: object) -> Tensor:
    return output_of(SharedProblem(*arguments))


@torch.library.register_fake("gravity_hf::shared_attention_backward")
def _attention_backward_shapes(grad: Tensor, *arguments: object) -> tuple[Tensor, ...]:
    *fields, needed = arguments
    problem = SharedProblem(*fields)
    return tuple(
        room_of(problem, name) if need and getattr(problem, name) is not None else grad.new_empty(0)
        for name, need in zip(DIFFERENTIABLE, needed, strict=True)
    )


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.options = inputs[_TENSORS:]


def _gradient(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    arguments = (*ctx.saved_tensors, *ctx.options)
    needed = list(ctx.needs_input_grad[:_COUNT])
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_observed([grad]):
        results = torch.ops.gravity_hf.shared_attention_backward(grad, *arguments, needed)
    else:
        results = shared_backward(grad, SharedProblem(*arguments), needed)
    results = [result if need else None for result, need in zip(results, needed, strict=True)]
    return (*results, *[None] * (_ALL - _COUNT))


torch.library.register_autograd("gravity_hf::shared_attention", _gradient, setup_context=_save)
torch.library.register_autograd("gravity_hf::shared_attention_backward", no_second_gradient)
