"""How published Lightweight Gravitational Transformers call their weights, of both kinds of models.

The tri-model has three of them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .converting import some_of

_LAYER = re.compile(r"layers\.(\d+)\.(.+)")
_HEAD = re.compile(r"attn\.heads\.(\d+)\.(G|mass_proj\.weight)")
_RENAMED = {"ffn.0": "fc1", "ffn.3": "fc2", "norm1": "norm1", "norm2": "norm2"}


def core_state(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The weights of a published LGT without its embedding and head, under `LGTModel`'s names.

    `heads.*.G` are stacked, `heads.*.mass_proj.weight` joined; `token_mass`, which the published
    forward never reads, is left out. Unknown names are kept as they are: a strict load names them.

    Args:
        state: published names.
        prefix: of the model's names in `state`, such as `"world_model."`; others are left out.
    """
    named: dict[str, Tensor] = {}
    heads: dict[str, dict[int, Tensor]] = {}
    for full, tensor in state.items():
        if not full.startswith(prefix):
            continue
        key = full.removeprefix(prefix)
        layer = _LAYER.fullmatch(key)
        if layer is None:
            named[re.sub(r"^final_norm\.", "norm.", key)] = tensor
            continue
        index, rest = layer.groups()
        head = _HEAD.fullmatch(rest)
        if head is not None:
            name = f"layers.{index}.attn.gravity.{head[2]}"
            heads.setdefault(name, {})[int(head[1])] = tensor
        elif rest != "token_mass":
            part, _, kind = rest.rpartition(".")
            named[f"layers.{index}.{_RENAMED.get(part, part)}.{kind}"] = tensor
    for name, parts in heads.items():
        if sorted(parts) != list(range(len(parts))):
            raise ValueError(
                f"{prefix}{name}: expected heads 0 to {len(parts) - 1}, got {sorted(parts)}. The "
                "checkpoint is incomplete"
            )
        rows = [parts[i].reshape(1, -1) for i in range(len(parts))]
        widths = sorted({row.shape[1] for row in rows})
        if len(widths) > 1:
            raise ValueError(
                f"{prefix}{name}: expected heads of one width, got {widths}. The checkpoint is "
                "damaged"
            )
        joined = torch.cat(rows)
        named[name] = joined.flatten() if name.endswith(".G") else joined
    return named


def core_sizes(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Any]:
    """What the weights of a published LGT say about its config, by the names of `LGTConfig`.

    They do not say the curvature of attention, event horizon, ceiling and dropout.

    Raises:
        ValueError: `state` is not that of such a model.
    """
    layers = _count(state, rf"{re.escape(prefix)}layers\.(\d+)\.")
    heads = _count(state, rf"{re.escape(prefix)}layers\.0\.attn\.heads\.(\d+)\.")
    curved = state.get(f"{prefix}pos_embedding.positions")
    fractal = state.get(f"{prefix}pos_embedding.basis")
    norm, inner = state.get(f"{prefix}final_norm.weight"), f"{prefix}layers.0.ffn.0.weight"
    table = fractal if curved is None else curved
    if table is None or norm is None or not layers or not heads or inner not in state:
        raise ValueError(
            f"expected the weights of a published LGT ({prefix}layers.0.attn.heads.0.G, "
            f"{prefix}pos_embedding.positions or .basis, {prefix}final_norm.weight, ...), got "
            f"{some_of(state)}. Check that the file holds such a model"
        )
    dims = (table.dim(), norm.dim(), state[inner].dim())
    if dims != (2, 1, 2) or not norm.numel():
        shapes = [list(x.shape) for x in (table, norm, state[inner])]
        raise ValueError(
            f"expected positions [T, P], {prefix}final_norm.weight [d] and {inner} [n, d], got "
            f"{shapes}. The checkpoint is damaged"
        )
    width = norm.shape[0]
    sizes: dict[str, Any] = {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "max_position_embeddings": table.shape[0],
        "dim_position": table.shape[1],
        "ff_expansion": _expansion(state[inner].shape[0], width),
        "position_type": "fractal" if curved is None else "curved",
    }
    if curved is None:
        sizes["learnable_residual"] = f"{prefix}pos_embedding.residual" in state
    return sizes


def _expansion(inner: int, width: int) -> float:
    """The ratio from which `int(width * ratio)` gives `inner` again."""
    ratio = inner / width
    return ratio if int(width * ratio) == inner else math.nextafter(ratio, math.inf)


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    found = (re.match(pattern, key) for key in state)
    return len({match[1] for match in found if match})
