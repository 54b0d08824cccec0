"""The kernels as torch knows them: operators with shapes for tracing, and the gradient.

`gravity_hf::triton_attention` takes the fields of `Problem` and `save`, what the backward will
need: 0 nothing, 1 gradients of q, k, v, key terms and sinks, 2 of all terms but eps and radii of
keys, 3 of all. It is opaque to tracers, so it works under `torch.compile(fullgraph=True)`,
`torch.export` and inside CUDA graphs: nothing in it waits for the device or reads a value from it.
Outside tracers `attention` goes round it: the dispatcher's way through Python costs a call half a
millisecond.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from .backward import backward
from .decode import decode_attention, serves_decoding
from .forward import SAVED, forward
from .problem import Problem
from .sinks import power_unit

_ARGUMENTS = (
    "Tensor? q, Tensor? k, Tensor v, Tensor strength, Tensor? eps, Tensor? key_radius_sq, "
    "Tensor? query_mass, Tensor? key_term, Tensor? head_bias, Tensor? radius, Tensor? table, "
    "Tensor? sink, Tensor? mask, Tensor? key_ranges, Tensor? seed, str law, bool causal, "
    "int window, bool exclude_self, bool repulsive, str cutoff, float width, float max_force, "
    "float dropout_p, str cap, float? kappa, float horizon, int save"
)
# Tensors that can have a gradient come first, then the other tensors, then options.
_DIFFERENTIABLE, _TENSORS, _COUNT = 12, 15, 28
_STRENGTH, _EPS, _KEY_RADIUS, _KEY_TERM, _SINK = 3, 4, 5, 7, 11

torch.library.define("gravity_hf::triton_attention", f"({_ARGUMENTS}) -> (Tensor, Tensor)")
torch.library.define(
    "gravity_hf::triton_attention_backward",
    f"(Tensor grad, Tensor out, Tensor saved, {_ARGUMENTS}) -> "
    f"({', '.join(['Tensor'] * _DIFFERENTIABLE)})",
)


def _needed_level(position: int) -> int:
    """The `save` at which the tensor at a position gets a gradient."""
    if position < _STRENGTH or position in (_KEY_TERM, _SINK):
        return 1
    return 3 if position in (_EPS, _KEY_RADIUS) else 2


def _gradient_room(grad: Tensor, arguments: tuple) -> tuple[Tensor, ...]:
    """A tensor for each gradient; empty where there is none."""
    save = arguments[-1]
    return tuple(
        grad.new_empty(0)
        if tensor is None or save < _needed_level(position)
        else torch.empty_like(tensor)
        for position, tensor in enumerate(arguments[:_DIFFERENTIABLE])
    )


def _device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Kernels start on the current device, which need not be the tensor's."""
    if tensor.device.type == "cuda" and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def _room(problem: Problem, wanted: bool) -> Tensor:
    """Room for what `forward` saves; empty if not wanted."""
    planes = SAVED + 1 if problem.dropout_p > 0 else SAVED
    padded = -(-problem.queries // 4) * 4
    shape = (planes, problem.batch, problem.heads, padded) if wanted else (0,)
    return problem.v.new_empty(shape, dtype=torch.float32)


def _decodes(problem: Problem) -> bool:
    """Whether the kernel for few queries has every term of this call."""
    if problem.table is not None or problem.dropout_p > 0:
        return False
    width = max(problem.width_k, problem.width_v)
    return serves_decoding(problem.queries, problem.heads, problem.kv_heads, width)


def _decode(problem: Problem) -> Tensor:
    """Laid out in memory as `forward` does, `[B, Tq, H, Dv]`."""
    sink = problem.sink
    if sink is not None and problem.law == "power":
        # Its distances have no unit.
        unit = power_unit(problem.eps, problem.width_k)
        sink = sink - (problem.strength * unit.log())[:, None]
    out = decode_attention(
        problem.q,
        problem.k,
        problem.v,
        problem.strength,
        problem.eps,
        law=problem.law,
        key_radius_sq=problem.key_radius_sq,
        query_mass=problem.query_mass,
        key_term=problem.key_term,
        mask=problem.mask,
        causal=problem.causal,
        window=problem.window or None,
        key_ranges=problem.key_ranges,
        sink=sink,
        head_bias=problem.head_bias,
        repulsive=problem.repulsive,
        cutoff=problem.cutoff,
        radius=problem.radius,
        cutoff_width=problem.width,
        exclude_self=problem.exclude_self,
        max_force=problem.max_force,
        cap=problem.cap,
        kappa=problem.kappa,
        horizon=problem.horizon,
    )
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def _compute(problem: Problem, save: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """The output, what `forward` saves and what it keeps."""
    saved = _room(problem, save > 0)
    if problem.empty:
        return problem.v.new_empty_strided(*problem.layout()).zero_(), saved, None
    with _device(problem.v):
        if save == 0 and _decodes(problem):
            return _decode(problem), saved, None
        out, norms = forward(problem, saved if save > 0 else None)
    return out, saved, norms


def _attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    *fields, save = arguments
    return _compute(Problem(*fields), save)[:2]


def _attention_backward(
    grad: Tensor, out: Tensor, saved: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *fields, save = arguments
    problem = Problem(*fields)
    if problem.empty:
        return tuple(x.zero_() for x in _gradient_room(grad, arguments))
    with _device(problem.v):
        results = backward(problem, out, saved, grad, sums=max(save - 1, 0))
    return tuple(grad.new_empty(0) if x is None else x for x in results)


torch.library.impl("gravity_hf::triton_attention", "default", _attention)
torch.library.impl("gravity_hf::triton_attention_backward", "default", _attention_backward)


@torch.library.register_fake("gravity_hf::triton_attention")
def _attention_shapes(*arguments: Any) -> tuple[Tensor, Tensor]:
    *fields, save = arguments
    problem = Problem(*fields)
    return problem.v.new_empty_strided(*problem.layout()), _room(problem, save > 0)


@torch.library.register_fake("gravity_hf::triton_attention_backward")
def _attention_backward_shapes(
    grad: Tensor, out: Tensor, saved: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    return _gradient_room(grad, arguments)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    out, saved = output
    ctx.mark_non_differentiable(saved)
    ctx.save_for_backward(out, saved, *inputs[:_TENSORS])
    ctx.options = inputs[_TENSORS:]


def _registered_gradient(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return _gradient(ctx, ctx.saved_tensors, grad)


def _gradient(ctx: Any, kept: tuple[Tensor, ...], grad: Tensor) -> tuple[Tensor | None, ...]:
    out, saved, *tensors = kept
    if saved.numel() == 0 and out.numel() > 0:
        raise RuntimeError(
            "gravity_hf::triton_attention: expected save >= 1 where a gradient is wanted, got 0. "
            "Call gravity_attention, which sets it"
        )
    results = torch.ops.gravity_hf.triton_attention_backward(
        grad, out, saved, *tensors, *ctx.options
    )
    return _wanted(ctx, results)


def _no_second_gradient(*_: Any) -> None:
    raise RuntimeError(
        "gravity_attention: expected one differentiation, got a second one; the triton "
        "implementation has first derivatives only. Use impl='reference'"
    )


torch.library.register_autograd(
    "gravity_hf::triton_attention", _registered_gradient, setup_context=_save
)
torch.library.register_autograd("gravity_hf::triton_attention_backward", _no_second_gradient)


class _Attention(torch.autograd.Function):
    """The operator without the dispatcher."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        *fields, save = arguments
        out, saved, norms = _compute(Problem(*fields), save)
        ctx.save_for_backward(norms, out, saved, *arguments[:_TENSORS])
        ctx.options = arguments[_TENSORS:]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            # A second differentiation may follow; the operator refuses that one.
            return _gradient(ctx, ctx.saved_tensors[1:], grad)
        norms, out, saved, *tensors = ctx.saved_tensors
        *options, save = ctx.options
        problem = Problem(*tensors, *options)
        if problem.empty:
            return _wanted(ctx, _attention_backward(grad, out, saved, *tensors, *ctx.options))
        with _device(problem.v):
            results = backward(problem, out, saved, grad, sums=max(save - 1, 0), norms=norms)
        return _wanted(ctx, results)


def _wanted(ctx: Any, results: tuple[Tensor, ...]) -> tuple[Tensor | None, ...]:
    needed = ctx.needs_input_grad[:_DIFFERENTIABLE]
    chosen = [result if need else None for result, need in zip(results, needed, strict=True)]
    return (*chosen, *[None] * (_COUNT - _DIFFERENTIABLE))


def attention(*fields: Any) -> Tensor:
    """Output `[B, H, Tq, Dv]` of the fields of a `Problem`."""
    save = 0
    if torch.is_grad_enabled():
        for position, tensor in enumerate(fields[:_DIFFERENTIABLE]):
            if tensor is not None and tensor.requires_grad:
                save = max(save, _needed_level(position))
    if _traced(fields):
        return torch.ops.gravity_hf.triton_attention(*fields, save)[0]
    if forward_ad._current_level >= 0:
        _refuse_tangents(fields)
    if save == 0:
        return _attention(*fields, save)[0]
    return _Attention.apply(*fields, save)


def _refuse_tangents(fields: tuple) -> None:
    tensors = [x for x in fields[:_DIFFERENTIABLE] if x is not None]
    if any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
        raise RuntimeError(
            "gravity_attention: expected tensors without tangents, got forward-mode derivatives; "
            "the triton implementation has backward ones only. Use impl='reference'"
        )


def _traced(fields: tuple) -> bool:
    """Whether a compiler, a mode or a transform looks on, or something stands in for tensors."""
    if torch.compiler.is_compiling() or torch._C._is_tracing():
        return True
    if torch._C._len_torch_dispatch_stack() > 0:
        return True
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return True
    tensors = [x for x in fields[:_TENSORS] if x is not None]
    return any(type(x) not in (Tensor, torch.nn.Parameter) or x.is_meta for x in tensors)
