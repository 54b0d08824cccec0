"""The published LeanFormer, told again in float64 from its description, and made causal.

Row by row, without a mask: a query has the keys up to its own, and nothing else exists for it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

SETTINGS: dict[str, Any] = {
    "vocab_size": 31,
    "d_model": 16,
    "n_heads": 2,
    "n_layers": 2,
    "d_ff": 24,
    "max_seq_len": 20,
    "attention_rank": 5,
    "ff_rank": 6,
    "screening_rank": 3,
    "attention_top_k": 4,
    "ff_gate_rank": 3,
    "ff_sparsity_target": 0.7,
    "min_depth": 1,
    "exit_threshold": 0.02,
    "dropout": 0.1,
}


def published_state(settings: dict[str, Any] = SETTINGS, seed: int = 0) -> dict[str, Tensor]:
    """Random weights under published names, the mask that is kept with them included."""
    draw = torch.Generator().manual_seed(seed)
    d, inner, vocabulary = settings["d_model"], settings["d_ff"], settings["vocab_size"]
    attention, wide = settings["attention_rank"], settings["ff_rank"]
    maps = {f"attn.{x}": (d, d, attention) for x in ("q_proj", "k_proj", "v_proj", "out_proj")}
    maps |= {f"attn.{x}": (d, d // 4, settings["screening_rank"]) for x in ("q_screen", "k_screen")}
    maps |= {f"ff.{x}": (d, inner, wide) for x in ("up_proj", "gate_proj")}
    maps |= {"ff.down_proj": (inner, d, wide)}
    shapes: dict[str, tuple[int, ...]] = {
        "token_embedding.weight": (vocabulary, d),
        "position_embedding.weight": (settings["max_seq_len"], d),
        "norm.weight": (d,),
        "norm.bias": (d,),
        "lm_head.A": (d, attention),
        "lm_head.B": (attention, vocabulary),
        "depth_controller.exit_head.0.weight": (d // 4, d),
        "depth_controller.exit_head.0.bias": (d // 4,),
        "depth_controller.exit_head.2.weight": (1, d // 4),
        "depth_controller.exit_head.2.bias": (1,),
    }
    for layer in range(settings["n_layers"]):
        start = f"layers.{layer}."
        for name, (width, out, rank) in maps.items():
            rank = min(rank, width, out)
            shapes |= {f"{start}{name}.A": (width, rank), f"{start}{name}.B": (rank, out)}
            shapes |= {f"{start}{name}.bias": (out,)}
        gate = settings["ff_gate_rank"]
        shapes |= {f"{start}ff.activation_gate.A": (d, gate)}
        shapes |= {f"{start}ff.activation_gate.B": (gate, inner)}
        for norm in ("norm1", "norm2"):
            shapes |= {f"{start}{norm}.{kind}": (d,) for kind in ("weight", "bias")}
    state = {name: torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    longest = settings["max_seq_len"]
    return {**state, "causal_mask": torch.ones(longest, longest).tril()[None, None]}


def published_logits(
    state: dict[str, Tensor], ids: Tensor, settings: dict[str, Any] = SETTINGS
) -> Tensor:
    """`[T, V]` of one text, ids `[T]`, outside training."""
    s = {name: value.double() for name, value in state.items()}
    d, heads = settings["d_model"], settings["n_heads"]

    def mapped(name: str, x: Tensor) -> Tensor:
        y = x @ s[f"{name}.A"] @ s[f"{name}.B"]
        return y + s[f"{name}.bias"] if f"{name}.bias" in s else y

    def normed(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (d,), s[f"{name}.weight"], s[f"{name}.bias"])

    def attended(name: str, x: Tensor) -> Tensor:
        q, k, v = (mapped(f"{name}.{kind}", x) for kind in ("q_proj", "k_proj", "v_proj"))
        rows = []
        for t in range(len(x)):
            ranked = mapped(f"{name}.k_screen", x[: t + 1]) @ mapped(f"{name}.q_screen", x[t])
            best = ranked.topk(min(settings["attention_top_k"], t + 1)).indices
            parts = []
            for one_q, some_k, some_v in zip(
                q[t].chunk(heads), k[best].chunk(heads, -1), v[best].chunk(heads, -1), strict=True
            ):
                parts.append((some_k @ one_q / (d // heads) ** 0.5).softmax(0) @ some_v)
            rows.append(torch.cat(parts))
        return mapped(f"{name}.out_proj", torch.stack(rows))

    def fed(name: str, x: Tensor) -> Tensor:
        hidden = mapped(f"{name}.up_proj", x) * F.silu(mapped(f"{name}.gate_proj", x))
        kept = max(1, int(settings["d_ff"] * (1 - settings["ff_sparsity_target"])))
        chosen = mapped(f"{name}.activation_gate", x).topk(kept).indices
        mask = torch.zeros_like(hidden).scatter(-1, chosen, 1.0)
        return mapped(f"{name}.down_proj", hidden * mask)

    x = s["token_embedding.weight"][ids] + s["position_embedding.weight"][: len(ids)]
    for layer in range(settings["n_layers"]):
        x = x + attended(f"layers.{layer}.attn", normed(f"layers.{layer}.norm1", x))
        x = x + fed(f"layers.{layer}.ff", normed(f"layers.{layer}.norm2", x))
    return mapped("lm_head", normed("norm", x))
