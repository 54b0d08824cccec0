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


# As pretrain.json has it; what no card reads is left out.
RECORD: dict[str, Any] = {
    **{"loss": 2.5, "tokens": 40 * 6 * 24, "seed": 3},
    "arguments": {"architecture": "ngt", "length": 24, "repulsion_weight": 0.05},
    "training": {
        **{"learning_rate": 3e-3, "lr_scheduler_type": "cosine_with_min_lr", "max_steps": 40},
        **{"lr_scheduler_kwargs": {"min_lr_rate": 0.1}, "warmup_steps": 0.1},
        **{"weight_decay": 0.1, "bf16": True},
    },
    "text": {"description": "two files", "digest": "0123456789abcdef", "bytes_per_token": 2.0},
    "conditions": {
        **RESULTS["conditions"],
        "command": "python /home/me/scripts/pretrain.py --output_dir /home/me/out",
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
