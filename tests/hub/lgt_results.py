"""Shared by the tests of LGT's card: a tiny saved model, and results of a training."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

import gravity_hf  # noqa: F401  registers LGT

SIZES: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "dim_position": 8,
    "max_position_embeddings": 24,
}
RESULTS: dict[str, Any] = {
    "format": 1,
    "model_type": "lgt",
    "training": {
        **{"seed": 7, "steps": 300, "rows": 8, "length": 24, "tokens": 57600, "warmup_steps": 30},
        **{"learning_rate": 1e-3, "learning_rates_tried": [5e-4, 1e-3], "weight_decay": 0.0},
        **{"bfloat16": False, "text": "two files", "digest": "0123456789abcdef"},
    },
    "evaluation": {
        "measure": "bits_per_byte",
        "text": "two files",
        "digest": "0123456789abcdef",
        "tokens": 4096,
        "length": 24,
        "rows": [
            {"key": "unigram", "title": "unigram", "parameters": 31, "bits_per_byte": [4.75]},
            {"key": "bigram", "title": "bigram", "parameters": 961, "bits_per_byte": [3.5]},
            {
                "key": "softmax",
                "title": "softmax",
                "parameters": 12345,
                "bits_per_byte": [2.25, 2.375],
            },
            {"key": "this", "title": "LGT", "parameters": 6789, "bits_per_byte": [2.625, 2.75]},
        ],
        "own": 2.625,
        "samples": [{"prompt": "def ", "text": "read(self):"}],
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


def saved_lgt(folder: Path, **changes: Any) -> Path:
    """A new LGT language model, saved."""
    torch.manual_seed(0)
    config = AutoConfig.for_model("lgt", **{**SIZES, **changes})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder
