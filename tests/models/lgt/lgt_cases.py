"""Tiny LGTs whose attention matters, padded inputs, and published models with their outputs."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor

from gravity_hf.models.lgt import LGTConfig, LGTForCausalLM, LGTPreTrainedModel

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "lgt"
VOCABULARY = 50
IDS = torch.arange(18).reshape(2, 9) * 7 % 47 + 3
SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "dim_position": 16,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
# Every option that changes what a token sees or how strongly.
OPTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "published": {"softening": 0.0},
    "tanh": {"force_cap": "tanh", "max_force": 2.0},
    "uncapped": {"max_force": None},
    "exclude_self": {"exclude_self": True},
    "power": {"force_law": "power"},
    "values": {"value_projection": True},
    "fractal": {"position_type": "fractal"},
    "flat": {"curvature": 0.0},
    "power_alone": {"force_law": "power", "exclude_self": True, "position_type": "fractal"},
}


def tiny(model_class: type = LGTForCausalLM, **settings: Any) -> LGTPreTrainedModel:
    """In evaluation; linear maps five times as large as a new model's, so that tokens matter."""
    torch.manual_seed(0)
    model = model_class(LGTConfig(**{**SMALL, **settings})).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 2 and "pos_embedding" not in name and "embed_tokens" not in name:
                weight.mul_(5.0)
            if name.endswith("positions"):
                weight.mul_(4.0)
    return model


def padded(side: str, count: int = 3) -> dict[str, Tensor]:
    """`IDS` with padding on a side, and the mask; keyword arguments of a model."""
    pads = torch.zeros(2, count, dtype=torch.long)
    parts, seen = [IDS, pads], [torch.ones_like(IDS), pads]
    if side == "left":
        parts, seen = parts[::-1], seen[::-1]
    return {"input_ids": torch.cat(parts, 1), "attention_mask": torch.cat(seen, 1)}


class Published(NamedTuple):
    """A published model: its state, constructor arguments, inputs and outputs."""

    state: dict[str, Tensor]
    kwargs: dict[str, Any]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    parameters: int | None


@functools.cache
def _file() -> tuple[dict[str, Tensor], dict[str, Any]]:
    facts = json.loads((GOLDEN / "model.json").read_text(encoding="utf-8"))
    return load_file(GOLDEN / "model.safetensors"), facts


def published(case: str) -> Published:
    tensors, facts = _file()

    def part(kind: str) -> dict[str, Tensor]:
        prefix = f"{case}/{kind}/"
        return {k.removeprefix(prefix): x for k, x in tensors.items() if k.startswith(prefix)}

    known = facts[case]
    parts = (part(kind) for kind in ("in", "out"))
    return Published(part("state"), known["kwargs"], *parts, known.get("n_params"))


MODELS = [case for case in _file()[1] if not case.startswith("block")]
BLOCKS = [case for case in _file()[1] if case.startswith("block")]
