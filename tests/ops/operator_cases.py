"""Inputs shared by the tests of the operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gravity_hf.config import EPSILON_FLOOR
from gravity_hf.ops.curvature import Curvature
from gravity_hf.ops.cutoff import Cutoff
from gravity_hf.ops.reference import gravity_attention_reference, squared_distance

FAMILIES = ("random", "near", "collision", "far", "tiny_eps", "dominating_mass", "equal_keys")

# What a call adds to the plain law: inputs, then options.
TERMS = {
    "bias": ({"head_bias": True}, {}),
    "repulsive": ({"head_bias": True}, {"repulsive": True}),
    "max_force": ({"head_bias": True}, {"max_force": 0.3}),
    "hard": ({"radius": True}, {"cutoff": "hard"}),
    "soft": ({"radius": True}, {"cutoff": "soft"}),
    "log": ({"radius": True}, {"cutoff": "log"}),
    "hard-power": ({"radius": True, "law": "power"}, {"cutoff": "hard"}),
    "log-power": ({"radius": True, "law": "power"}, {"cutoff": "log"}),
    "exclude_self": ({}, {"exclude_self": True}),
    "exclude_self-power": ({"law": "power"}, {"exclude_self": True}),
    "ngt": (
        {"radius": True, "head_bias": True},
        {"cutoff": "hard", "repulsive": True, "exclude_self": True},
    ),
    "lgt": ({"table": True}, {"max_force": 2.0}),
    "table": ({"table": True, "head_bias": True}, {"repulsive": True, "exclude_self": True}),
    "table-power": ({"table": True, "law": "power"}, {}),
    "tanh": ({"head_bias": True}, {"max_force": 0.7, "force_cap": "tanh"}),
    "lgt-tanh": ({"table": True}, {"max_force": 2.0, "force_cap": "tanh", "exclude_self": True}),
    # About a third of the pairs of standard normal vectors have no more than the horizon.
    "curved": ({}, {"curvature": Curvature(1.4, 0.5), "max_force": 1.5}),
    "curved-power": ({"law": "power"}, {"curvature": Curvature(-0.8, 0.3)}),
}
# A table for each batch entry, as left padding makes it.
BATCH_TERMS = {
    "batch": ({"table": "batch", "head_bias": True}, {"max_force": 2.0}),
    "batch-power": ({"table": "batch", "law": "power"}, {"exclude_self": True}),
}


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
    head_bias: bool = False,
    radius: bool = False,
    table: bool | str = False,
    sinks: str | None = None,
    law: str = "force",
    family: str = "random",
    seed: int = 0,
) -> dict[str, Any]:
    """Arguments of the operator in float64; see `FAMILIES` for what is special about each.

    radius: of a cutoff, which leaves each head about half of the pairs; `run` takes its kind.
    table: `inverse_distance` in the place of q, k, eps and key_radius_sq; "batch": one for each
    batch entry.
    sinks: "head" or "row", of either shape; near the scores of keys, below and above.
    """
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
    if head_bias:
        inputs["head_bias"] = normal(heads)
    if radius:
        groups = heads // key_heads
        lifted_sq = inputs["key_radius_sq"].repeat_interleave(groups) if lifted else None
        k = inputs["k"].repeat_interleave(groups, 1)
        distance_sq = squared_distance(inputs["q"], k, lifted_sq).transpose(0, 1).flatten(1)
        middle = distance_sq.median(1).values
        inputs["radius"] = (middle * (0.8 + 0.4 * uniform(heads)) + 0.1).sqrt()
    if sinks is not None:
        # The origin is nearer to most queries than their keys are.
        inputs["sinks"] = normal(*((heads,) if sinks == "head" else (batch, heads, queries))) - 1
    if table:
        for name in ("q", "k", "eps", "key_radius_sq"):
            inputs.pop(name, None)
        lead = (batch, 1) if table == "batch" else ()
        inputs["inverse_distance"] = 1 / (0.2 + normal(*lead, queries, keys).square())
    return inputs


def cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """q, k, v in `dtype`; per-head terms in float32 (float64 for float64), as in patched models."""
    small = torch.float64 if dtype == torch.float64 else torch.float32
    return {n: x.to(dtype if n in ("q", "k", "v") else small) for n, x in inputs.items()}


def run(
    implementation: Any,
    inputs: dict[str, Any],
    *,
    cutoff: str | None = None,
    width: float = 1.0,
    **options: Any,
) -> Tensor:
    """`cutoff`: the kind of one whose radius is among the inputs; `width`: its width."""
    arguments = dict(inputs)
    tensors = [arguments.pop(name, None) for name in ("q", "k", "v", "mass")]
    arguments.setdefault("eps", None)
    radius = arguments.pop("radius", None)
    if cutoff is not None:
        arguments["cutoff"] = Cutoff(radius, cutoff, width)
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


def packed_ranges(*lengths: int) -> Tensor:
    """Key ranges `[1, T, 2]` of documents of these lengths."""
    rows, start = [], 0
    for length in lengths:
        rows += [[start, start + length]] * length
        start += length
    return torch.tensor([rows], dtype=torch.int32)


def padding_ranges(batch: int, keys: int, side: str) -> Tensor:
    """Key ranges `[B, 1, 2]` that hide what `padding_mask` hides."""
    hidden = [row * keys // 3 for row in range(batch)]
    rows = [[x, keys] if side == "left" else [0, keys - x] for x in hidden]
    return torch.tensor(rows, dtype=torch.int32)[:, None]


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
