"""Shared by the tests of NGT's card: a tiny saved model, and results of a training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from gravity_hf import NGTConfig, NGTForCausalLM

SIZES: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 16,
    "coord_dim": 6,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 24,
}
RESULTS: dict[str, Any] = {
    "format": 1,
    "model_type": "ngt",
    "training": {
        **{"seed": 7, "steps": 300, "rows": 8, "length": 24, "tokens": 57600, "warmup_steps": 30},
        **{"learning_rate": 1e-3, "learning_rates_tried": [5e-4, 1e-3], "weight_decay": 0.01},
        **{"bfloat16": True, "text": "two files", "digest": "0123456789abcdef"},
    },
    "evaluation": {
        "measure": "bits_per_byte",
        "text": "two files",
        "digest": "0123456789abcdef",
        "tokens": 4096,
        "length": 24,
        "rows": [
            {"key": "v", "title": "vanilla", "parameters": 12345, "bits_per_byte": [2.25, 2.375]},
            {"key": "this", "title": "NGT", "parameters": 6789, "bits_per_byte": [2.625, 2.75]},
        ],
        "own": 2.625,
    },
    "conditions": {
        "command": "python train.py",
        "date": "2026-01-02",
        "device": "a processor",
        "versions": {"torch": "2.13.0"},
    },
}


def results(**changes: Any) -> dict[str, Any]:
    """A copy with other top keys."""
    return {**copy.deepcopy(RESULTS), **changes}


def config(preset: str = "v2", **changes: Any) -> NGTConfig:
    """Of a tiny model."""
    return NGTConfig.from_preset(preset, **{**SIZES, **changes})


def saved_ngt(folder: Path, preset: str = "v2", **changes: Any) -> Path:
    """A new NGT language model, saved."""
    torch.manual_seed(0)
    NGTForCausalLM(config(preset, **changes)).save_pretrained(folder)
    return folder
