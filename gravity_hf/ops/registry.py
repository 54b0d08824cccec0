"""The operator as torch knows it: schemas, shapes for tracing, and the gradient.

Outside tracers `attention` goes round the dispatcher, whose way through Python costs a short
sequence as much as its attention does. `gravity_hf::attention` works on augmented queries and keys
(`chunked.augment`). Being one opaque operator it may look at mask values to skip keys, which a
traced graph could not.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .blockwise import DIFFERENTIABLE, attention_backward, attention_forward
from .problem import Problem

# Fields of `problem.Problem`, in its order.
_ARGUMENTS = (
    "Tensor? q, Tensor? k, Tensor v, Tensor strength, Tensor? eps, Tensor? offset, "
    "Tensor? key_term, Tensor? radius_sq, Tensor? table, Tensor? sink, Tensor? mask, "
    "Tensor? key_ranges, Tensor? seed, str law, bool causal, int? window, bool exclude_self, "
    "str? cutoff, float cutoff_width, float? max_force, float dropout_p, float? softcap, "
    "bool lifted, float? curvature_kappa, float horizon, bool smooth_cap"
)
_ALL = _ARGUMENTS.count(",") + 1
_TENSORS = _ARGUMENTS.count("Tensor")
_COUNT = len(DIFFERENTIABLE)

torch.library.define("gravity_hf::attention", f"({_ARGUMENTS}) -> Tensor")
torch.library.define(
    "gravity_hf::attention_backward",
    f"(Tensor grad, {_ARGUMENTS}, bool mask_needs_grad) -> ({', '.join(['Tensor'] * _COUNT)})",
)


def attention(*arguments: object) -> Tensor:
    """`arguments`: the fields of `Problem`. Output `[B, H, Tq, Dv]`."""
    tensors = [x for x in arguments[:_TENSORS] if x is not None]
    if torch.compiler.is_compiling() or is_observed(tensors):
        refuse_tangents(tensors)
        return torch.ops.gravity_hf.attention(*arguments)
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return _Attention.apply(*arguments)
    return attention_forward(Problem(*arguments))


def is_observed(tensors: Sequence[Tensor]) -> bool:
    """Whether a mode, a transform or a tensor that stands in for another looks for operators; not
    asked about compilers."""
    if torch._C._len_torch_dispatch_stack() > 0 or forward_ad._current_level >= 0:
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    return not all(_is_plain(x) for x in tensors)


def _is_plain(tensor: Tensor) -> bool:
    # Batches of gradients (`is_grads_batched`) come as tensors of this kind, outside of any stack.
    batched = torch._C._functorch.is_legacy_batchedtensor(tensor)
    return type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta and not batched


def refuse_tangents(tensors: Sequence[Tensor]) -> None:
    """The operator would lose them without a word."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(
            "gravity_attention: expected tensors without tangents, got forward-mode derivatives; "
            "the chunked implementation has backward ones only. Use impl='reference'"
        )


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(*arguments: object) -> Tensor:
        return attention_forward(Problem(*arguments))

    @staticmethod
    def setup_context(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor):
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple:
        return _gradient(ctx, grad)


# "default": plain torch inside, so one implementation serves every device.
@torch.library.impl("gravity_hf::attention", "default")
def _attention(*arguments: object) -> Tensor:
    return attention_forward(Problem(*arguments))


@torch.library.impl("gravity_hf::attention_backward", "default")
def _attention_backward(grad: Tensor, *arguments: object) -> tuple[Tensor, ...]:
    *problem, mask_needs_grad = arguments
    return tuple(attention_backward(grad, Problem(*problem), mask_needs_grad))


@torch.library.register_fake("gravity_hf::attention")
def _attention_shape(*arguments: object) -> Tensor:
    problem = Problem(*arguments)
    return problem.per_query(problem.v.shape[3])


@torch.library.register_fake("gravity_hf::attention_backward")
def _attention_backward_shapes(grad: Tensor, *arguments: object) -> tuple[Tensor, ...]:
    *problem, mask_needs_grad = arguments
    results = []
    for name, tensor in zip(DIFFERENTIABLE, problem, strict=False):
        if tensor is None or (name == "mask" and not mask_needs_grad):
            results.append(grad.new_empty(0))
        else:
            results.append(torch.empty_like(tensor, memory_format=torch.contiguous_format))
    return tuple(results)


def _save(ctx: torch.autograd.function.FunctionCtx, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:_TENSORS])
    ctx.options = inputs[_TENSORS:]


def _gradient(ctx: torch.autograd.function.FunctionCtx, grad: Tensor) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:_COUNT]
    arguments = (*ctx.saved_tensors, *ctx.options)
    of_mask = needed[DIFFERENTIABLE.index("mask")]
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or is_observed([grad]):
        results = torch.ops.gravity_hf.attention_backward(grad, *arguments, of_mask)
    else:
        results = attention_backward(grad, Problem(*arguments), of_mask)
    results = [result if need else None for result, need in zip(results, needed, strict=True)]
    return (*results, *[None] * (_ALL - _COUNT))


def no_second_gradient(*_: object) -> None:
    raise RuntimeError(
        "gravity_attention: expected one differentiation, got a second one; the chunked "
        "implementation has first derivatives only. Use impl='reference'."
    )


torch.library.register_autograd("gravity_hf::attention", _gradient, setup_context=_save)
torch.library.register_autograd("gravity_hf::attention_backward", no_second_gradient)
