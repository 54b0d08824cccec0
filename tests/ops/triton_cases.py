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


class _Rounded(torch.autograd.Function):
    """The identity to a dtype's precision, in the chosen directions."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, forward: bool) -> Tensor:
        ctx.dtype = dtype
        return x.to(dtype).to(x.dtype) if forward else x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.to(ctx.dtype).to(grad.dtype), None, None


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
    mask: None = None,
) -> Tensor:
    """The peer in half precision: scores in float32, and what goes through a product (weights, and
    the gradients of weights and distances) rounded to the dtype of v, as in all fused kernels."""
    dtype, groups = v.dtype, q.shape[1] // k.shape[1]
    q, k, v = (x.float() for x in (q, k, v))
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if key_radius_sq is not None:
        key_radius_sq = key_radius_sq.repeat_interleave(groups)
    distance_sq = _Rounded.apply(squared_distance(q, k, key_radius_sq), dtype, False)
    score = gravity_score(distance_sq, mass, eps, law, query_mass, key_mass)
    seen = visible_keys(q.shape[2], k.shape[2], causal=causal, device=q.device)
    weights = score.softmax(-1)
    if seen is not None:
        weights = score.masked_fill(~seen, torch.finfo(score.dtype).min).softmax(-1)
        weights = weights * seen.any(-1, keepdim=True)
    weights = _Rounded.apply(weights, dtype, True)
    return (weights @ v).to(dtype)


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
        assert_within_budget(name, *stacked, factor=factor)


__all__ = ["DEVICE", "check", "check_budgets", "kernel_results", "moved", "require_kernels", "run"]
