"""What the tests of the Triton kernels share: where they run, and what they are held to."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from helpers import assert_within_budget
from ops.operator_cases import cast, run, values_and_gradients
from torch import Tensor

from gravity_hf.ops.reference import (
    gravity_attention_reference,
    gravity_score,
    squared_distance,
    visible_keys,
)
from gravity_hf.ops.triton import gravity_attention_triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def require_kernels() -> None:
    """Skip the module where kernels cannot run. Compiled on a GPU, interpreted on a CPU."""
    pytest.importorskip("triton")
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("Triton needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)


def moved(values: dict[str, Any]) -> dict[str, Any]:
    return {n: x.to(DEVICE) if isinstance(x, Tensor) else x for n, x in values.items()}


def kernel_results(inputs: dict[str, Tensor], **options: Any) -> dict[str, Tensor]:
    """Output and gradients of the kernels, on the CPU. A mask gets no gradient."""
    mask = options.pop("mask", None)

    def implementation(*tensors: Tensor, **arguments: Any) -> Tensor:
        arguments["mask"] = None if mask is None else mask.to(DEVICE)
        return gravity_attention_triton(*tensors, **arguments)

    results = values_and_gradients(implementation, moved(inputs), **moved(options))
    return {name: x.cpu() for name, x in results.items()}


def check(inputs: dict[str, Tensor], tolerance: float = 1e-4, **options: Any) -> None:
    """float32 kernels against the float64 reference, relative to the largest element. Inputs are
    rounded to float32 before either sees them."""
    given = cast(inputs, torch.float32)
    mask = options.pop("mask", None)
    if mask is not None and mask.is_floating_point():
        mask = mask.float()
    doubles = {name: x.double() for name, x in given.items()}
    expected = values_and_gradients(gravity_attention_reference, doubles, mask=mask, **options)
    actual = kernel_results(given, mask=mask, **options)
    expected.pop("mask", None)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=0.1)
        error = ((actual[name].double() - value).abs().max() / scale).item()
        assert error < tolerance, f"{name}: relative error {error:.1e}"


class _RoundedGradient(torch.autograd.Function):
    """The identity, whose gradient is rounded to a dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = dtype
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.to(ctx.dtype).to(grad.dtype), None


class _FusedSoftmax(torch.autograd.Function):
    """`softmax(score) v` with what fused kernels round: weights before their product with v, and
    the output, from which the backward takes `delta = G_o.o` (Dao et al. 2022)."""

    @staticmethod
    def forward(ctx: Any, score: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
        # A row that sees nothing has no softmax; its weights are 0.
        weights = score.softmax(-1).nan_to_num(0.0)
        rounded = weights.to(dtype).float()
        out = (rounded @ v).to(dtype)
        ctx.save_for_backward(weights, rounded, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        weights, rounded, v, out = ctx.saved_tensors
        grad = grad.float()
        delta = (grad * out.float()).sum(-1, keepdim=True)
        return weights * (grad @ v.mT - delta), rounded.mT @ grad, None


def plain_in_dtype(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mass: Tensor,
    *,
    eps: Tensor,
    law: str,
    causal: bool,
    key_radius_sq: Tensor | None = None,
    query_mass: Tensor | None = None,
    key_mass: Tensor | None = None,
    sinks: Tensor | None = None,
    mask: None = None,
    key_ranges: Tensor | None = None,
    **terms: Any,
) -> Tensor:
    """The peer in half precision: scores in float32, and what every fused kernel rounds rounded to
    the dtype of v: weights, output, and the gradient of distances before its products."""
    dtype, groups = v.dtype, q.shape[1] // k.shape[1]
    q, k, v = (x.float() for x in (q, k, v))
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if key_radius_sq is not None:
        key_radius_sq = key_radius_sq.repeat_interleave(groups)
    distance_sq = _RoundedGradient.apply(squared_distance(q, k, key_radius_sq), dtype)
    score = gravity_score(distance_sq, mass, eps, law, query_mass, key_mass, **terms)
    shape = (q.shape[2], k.shape[2])
    seen = visible_keys(*shape, causal=causal, key_ranges=key_ranges, device=q.device)
    if seen is not None:
        score = score.masked_fill(~seen, -float("inf"))
    if sinks is not None:
        origin_sq = squared_distance(q, torch.zeros_like(k[:, :, :1]), key_radius_sq)
        sink = gravity_score(origin_sq, mass, eps, law) + sinks[:, None, None]
        score = torch.cat([score, sink], -1)
        v = torch.nn.functional.pad(v, (0, 0, 0, 1))
    return _FusedSoftmax.apply(score, v, dtype)


def check_budgets(dtype: torch.dtype, cases: list[dict[str, Tensor]], **options: Any) -> None:
    """Against float64 on the rounded inputs: 2 times the peer's error for the output, 3 times for
    gradients. The peer computes in float32, or in half precision as `plain_in_dtype`. Several cases
    are pooled: the largest error of a gradient with 4 elements is a lottery."""
    pooled: list[dict[str, list[Tensor]]] = [{}, {}, {}]
    for inputs in cases:
        given = cast(inputs, dtype)
        doubles = {name: x.double() for name, x in given.items()}
        peer = gravity_attention_reference if dtype == torch.float32 else plain_in_dtype
        results = (
            values_and_gradients(gravity_attention_reference, doubles, **options),
            values_and_gradients(peer, given, **options),
            kernel_results(given, **options),
        )
        for pool, result in zip(pooled, results, strict=True):
            for name, value in result.items():
                pool.setdefault(name, []).append(value)
    truth, peers, actual = pooled
    for name in truth:
        factor = 2.0 if name == "output" else 3.0
        assert [x.dtype for x in actual[name]] == [x.dtype for x in peers[name]], name
        stacked = [torch.stack(pool[name]) for pool in (actual, truth, peers)]
        if stacked[1].abs().max() < 1e-12:
            # It vanishes identically (one key, equal keys): what is left is rounding of terms of
            # size 1, and a peer may hit 0 by luck.
            assert stacked[0].abs().max() < max(torch.finfo(dtype).eps, 1e-5), name
            continue
        assert_within_budget(name, *stacked, factor=factor)


__all__ = ["DEVICE", "check", "check_budgets", "kernel_results", "moved", "require_kernels", "run"]
