"""Small tri-models and their inputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gravity_hf.layers.fusion import STREAMS
from gravity_hf.models.trimodel import TriModel, TriModelConfig, TriModelForCausalLM

VOCABULARY = 20
SIZES = {
    "hidden_size": 16,
    "dim_position": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 24,
    "vocab_size": VOCABULARY,
    "dropout": 0.0,
}
LENGTHS = {"world": 7, "self": 5, "env": 3}


def tiny_config(**given: Any) -> TriModelConfig:
    return TriModelConfig(**{**SIZES, **given})


def tiny_model(**given: Any) -> TriModel:
    return TriModel(tiny_config(**given)).eval()


def tiny_language_model(**given: Any) -> TriModelForCausalLM:
    settings = {"is_causal": True, "use_gate": True, **given}
    return TriModelForCausalLM(tiny_config(**settings)).eval()


def tokens(batch: int = 2, **lengths: int) -> dict[str, Tensor]:
    """Random ids of all three streams, `{"world": [B, N], ...}`."""
    sizes = {**LENGTHS, **lengths}
    return {name: torch.randint(VOCABULARY, (batch, sizes[name])) for name in STREAMS}


def ids_of(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """As arguments of `TriModel`."""
    return {f"{name}_input_ids": x for name, x in inputs.items()}


def language_ids(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """As arguments of `TriModelForCausalLM`."""
    ids = ids_of(inputs)
    return {"input_ids": ids.pop("world_input_ids"), **ids}
