"""The kernels as torch knows them: operators with shapes for tracing, and the gradient.

`gravity_hf::triton_attention` takes the fields of `Problem` and `save`, what the backward will
need: 0 nothing, 1 gradients of q, k, v and key terms, 2 of all terms. It is opaque to tracers, so
it works under `torch.compile(fullgraph=True)`, `torch.export` and inside CUDA graphs: nothing in it
waits for the device or reads a value from it.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from .backward import backward
from .decode import decode_attention, serves_decoding
from .forward import forward
from .problem import Problem

_ARGUMENTS = (
    "Tensor? q, Tensor? k, Tensor v, Tensor strength, Tensor? eps, Tensor? key_radius_sq, "
    "Tensor? query_mass, Tensor? key_term, Tensor? head_bias, Tensor? radius, Tensor? table, "
    "Tensor? mask, Tensor? key_ranges, Tensor? seed, str law, bool causal, int window, "
    "bool exclude_self, bool repulsive, str cutoff, float width, float max_force, float dropout_p, "
    "int save"
)
# Tensors that can have a gradient come first, then the other tensors, then options.
_DIFFERENTIABLE, _TENSORS, _COUNT = 11, 14, 24
_VALUE, _STRENGTH, _KEY_TERM = 2, 3, 7

torch.library.define("gravity_hf::triton_attention", f"({_ARGUMENTS}) -> (Tensor, Tensor)")
torch.library.define(
    "gravity_hf::triton_attention_backward",
    f"(Tensor grad, Tensor out, Tensor saved, {_ARGUMENTS}) -> "
    f"({', '.join(['Tensor'] * _DIFFERENTIABLE)})",
)


def _device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Kernels start on the current device, which need not be the tensor's."""
    if tensor.device.type == "cuda":
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def _room(tensor: Tensor, heads: int, queries: int, wanted: bool) -> Tensor:
    """Room for what `forward` saves; empty if not wanted."""
    shape = (3, tensor.shape[0], heads, -(-queries // 4) * 4) if wanted else (0,)
    return tensor.new_empty(shape, dtype=torch.float32)


def _decodes(problem: Problem) -> bool:
    """Whether the kernel for few queries has every term of this call."""
    absent = (problem.head_bias, problem.radius, problem.table)
    if any(x is not None for x in absent) or problem.repulsive or problem.exclude_self:
        return False
    if problem.max_force != float("inf") or problem.dropout_p > 0:
        return False
    width = max(problem.width_k, problem.width_v)
    return serves_decoding(problem.queries, problem.heads, problem.kv_heads, width)


def _decode(problem: Problem) -> Tensor:
    """Laid out in memory as `forward` does, `[B, Tq, H, Dv]`."""
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
    )
    return out.transpose(1, 2).contiguous().transpose(1, 2)


@torch.library.impl("gravity_hf::triton_attention", "default")
def _attention(*arguments: Any) -> tuple[Tensor, Tensor]:
    *fields, save = arguments
    problem = Problem(*fields)
    saved = _room(problem.v, problem.heads, problem.queries, save > 0)
    if problem.empty:
        shape = (problem.batch, problem.queries, problem.heads, problem.width_v)
        return problem.v.new_zeros(shape).transpose(1, 2), saved
    with _device(problem.v):
        if save == 0 and _decodes(problem):
            return _decode(problem), saved
        out = forward(problem, saved if save > 0 else None)
    return out, saved


@torch.library.impl("gravity_hf::triton_attention_backward", "default")
def _attention_backward(
    grad: Tensor, out: Tensor, saved: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    *fields, save = arguments
    problem = Problem(*fields)
    if problem.empty:
        tensors = arguments[:_DIFFERENTIABLE]
        return tuple(grad.new_empty(0) if x is None else torch.zeros_like(x) for x in tensors)
    with _device(problem.v):
        results = backward(problem, out, saved, grad, sums=save > 1)
    return tuple(grad.new_empty(0) if x is None else x for x in results)


@torch.library.register_fake("gravity_hf::triton_attention")
def _attention_shapes(*arguments: Any) -> tuple[Tensor, Tensor]:
    *fields, save = arguments
    problem = Problem(*fields)
    v = problem.v
    out = v.new_empty(problem.batch, problem.queries, problem.heads, problem.width_v)
    saved = _room(v, problem.heads, problem.queries, save > 0)
    return out.transpose(1, 2), saved


@torch.library.register_fake("gravity_hf::triton_attention_backward")
def _attention_backward_shapes(
    grad: Tensor, out: Tensor, saved: Tensor, *arguments: Any
) -> tuple[Tensor, ...]:
    save = arguments[-1]
    results = []
    for position, tensor in enumerate(arguments[:_DIFFERENTIABLE]):
        always = position < _STRENGTH or position == _KEY_TERM
        if tensor is None or not (always or save > 1):
            results.append(grad.new_empty(0))
        else:
            results.append(torch.empty_like(tensor))
    return tuple(results)


def _save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    out, saved = output
    ctx.mark_non_differentiable(saved)
    ctx.save_for_backward(out, saved, *inputs[:_TENSORS])
    ctx.options = inputs[_TENSORS:]


def _gradient(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    out, saved, *tensors = ctx.saved_tensors
    if saved.numel() == 0 and out.numel() > 0:
        raise RuntimeError(
            "gravity_hf::triton_attention: expected save >= 1 where a gradient is wanted, got 0. "
            "Call gravity_attention, which sets it"
        )
    results = torch.ops.gravity_hf.triton_attention_backward(
        grad, out, saved, *tensors, *ctx.options
    )
    needed = ctx.needs_input_grad[:_DIFFERENTIABLE]
    results = [result if need else None for result, need in zip(results, needed, strict=True)]
    return (*results, *[None] * (_COUNT - _DIFFERENTIABLE))


def _no_second_gradient(*_: Any) -> None:
    raise RuntimeError(
        "gravity_attention: expected one differentiation, got a second one; the triton "
        "implementation has first derivatives only. Use impl='reference'"
    )


torch.library.register_autograd("gravity_hf::triton_attention", _gradient, setup_context=_save)
torch.library.register_autograd("gravity_hf::triton_attention_backward", _no_second_gradient)


def attention(*fields: Any) -> Tensor:
    """The operator on the fields of a `Problem`: output `[B, H, Tq, Dv]`."""
    save = 0
    if torch.is_grad_enabled():
        wanted = [x is not None and x.requires_grad for x in fields[:_DIFFERENTIABLE]]
        terms = wanted[_STRENGTH:_KEY_TERM] + wanted[_KEY_TERM + 1 :]
        save = 2 if any(terms) else int(any(wanted))
    return torch.ops.gravity_hf.triton_attention(*fields, save)[0]
