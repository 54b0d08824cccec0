"""Inputs shared by the tests of the operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gravity_hf.config import EPSILON_FLOOR
from gravity_hf.ops.reference import gravity_attention_reference

LEAVES = ("q", "k", "v", "mass", "eps", "key_radius_sq", "query_mass", "key_mass")
FAMILIES = ("random", "near", "collision", "far", "tiny_eps", "dominating_mass", "equal_keys")


def make_inputs(
    *,
    batch: int = 2,
    heads: int = 4,
    key_heads: int = 2,
    queries: int = 9,
    keys: int = 11,
    width: int = 6,
    value_width: int | None = None,
    lifted: bool = False,
    token_masses: bool = False,
    law: str = "force",
    family: str = "random",
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of the operator in float64; see `FAMILIES` for what is special about each."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=g, dtype=torch.float64)

    q = normal(batch, heads, queries, width)
    k = normal(batch, key_heads, keys, width)
    v = normal(batch, key_heads, keys, value_width or width)
    inputs = {"q": q, "k": k, "v": v, "mass": 0.5 + uniform(heads), "eps": 0.1 + uniform(heads)}
    shared = min(queries, keys)
    first_of_group = q[:, :: heads // key_heads, :shared]
    if family == "near":
        k[:, :, :shared] = first_of_group + 1e-2 * normal(*first_of_group.shape)
    elif family == "collision":
        k[:, :, :shared] = first_of_group
    elif family == "far":
        inputs["q"], inputs["k"] = 10 * q, 10 * k
    elif family == "tiny_eps":
        inputs["eps"] = torch.full_like(inputs["eps"], EPSILON_FLOOR)
    elif family == "dominating_mass":
        inputs["mass"][0] = 30.0
    elif family == "equal_keys":
        inputs["k"] = k[:, :, :1].expand_as(k).clone()
    if lifted:
        inputs["key_radius_sq"] = inputs["k"].square().sum(-1).amax((0, 2)) + 0.5
    if token_masses:
        inputs["key_mass"] = 0.2 + uniform(batch, heads, keys)
        if law == "force":
            inputs["query_mass"] = normal(batch, heads, queries)
    return inputs


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """q, k, v in `dtype`; per-head terms in float32 (float64 for float64), as in patched models."""
    small = torch.float64 if dtype == torch.float64 else torch.float32
    return {n: x.to(dtype if n in ("q", "k", "v") else small) for n, x in inputs.items()}


def run(implementation: Any, inputs: dict[str, Any], **options: Any) -> Tensor:
    arguments = dict(inputs)
    tensors = [arguments.pop(name) for name in ("q", "k", "v", "mass")]
    result = implementation(*tensors, **arguments, **options)
    return result.output if implementation is gravity_attention_reference else result


def values_and_gradients(
    implementation: Any, inputs: dict[str, Any], **options: Any
) -> dict[str, Tensor]:
    """The output and the gradient of every tensor argument (a float mask included), for one fixed
    gradient of the output. In float64 where the inputs are."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in inputs.items()}
    mask = options.pop("mask", None)
    if mask is not None and mask.is_floating_point():
        mask = mask.detach().clone().requires_grad_()
    output = run(implementation, leaves, mask=mask, **options)
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(7))
    wanted = dict(leaves)
    if mask is not None and mask.requires_grad:
        wanted["mask"] = mask
    gradients = torch.autograd.grad(output, list(wanted.values()), direction.to(output))
    return {"output": output.detach(), **dict(zip(wanted, gradients, strict=True))}


def padding_mask(batch: int, keys: int, side: str) -> Tensor:
    """Bool `[B, 1, 1, Tk]`: row b hides `b * Tk / 3` keys at one side."""
    mask = torch.ones(batch, 1, 1, keys, dtype=torch.bool)
    for row in range(batch):
        hidden = row * keys // 3
        if side == "left":
            mask[row, ..., :hidden] = False
        else:
            mask[row, ..., keys - hidden :] = False
    return mask
