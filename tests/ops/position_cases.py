"""Positions as queries and keys, as the Lightweight Gravitational Transformer has them."""

from __future__ import annotations

import torch
from torch import Tensor

# How large such positions are at first.
SIZE = 0.02


def position_inputs(
    *,
    batch: int = 2,
    heads: int = 2,
    queries: int = 40,
    keys: int = 40,
    width: int = 32,
    value_width: int = 16,
    size: float = SIZE,
    softening: float = 0.2,
    masses: bool = True,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Arguments of the operator in float64. Query i and key `i + keys - queries` are one token: the
    same position, and the same mass. q and k are `[B, H, T, P]`, the same for all B and H."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    k = (size * normal(keys, width)).expand(batch, heads, keys, width)
    inputs = {
        "q": k[:, :, keys - queries :],
        "k": k,
        "v": normal(batch, heads, keys, value_width),
        "mass": 0.9 ** torch.arange(heads, dtype=torch.float64),
        "eps": torch.full((heads,), softening, dtype=torch.float64),
    }
    if masses:
        inputs["key_mass"] = torch.nn.functional.softplus(normal(batch, heads, keys))
        inputs["query_mass"] = inputs["key_mass"][:, :, keys - queries :].clone()
    return inputs


def expanded(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same, q and k again views of one position per token, which a cast has written out."""
    views = {name: inputs[name][:1, :1].contiguous() for name in "qk"}
    shapes = {name: inputs[name].shape for name in "qk"}
    return {**inputs, **{name: views[name].expand(shapes[name]) for name in "qk"}}
