"""Checkpoints as published training writes them, what was computed with them, and tokenizers."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from .ngt_cases import GOLDEN

# The model's kind -> its file, and the name of its logits for `outputs()["prompt"]`.
FILES = {
    "ngt": (GOLDEN / "ref_ckpt_ngt.pt_best.pt", "logits"),
    "legacy": (GOLDEN / "ref_ckpt_legacy_nomass.pt", "legacy_logits"),
    "vanilla": (GOLDEN / "ref_ckpt_vanilla.pt_best.pt", "vanilla_logits"),
}
BLOCK = 16


@functools.cache
def _content(kind: str) -> dict[str, Any]:
    return torch.load(FILES[kind][0], weights_only=True)


def content(kind: str) -> dict[str, Any]:
    """Of the file, to be changed."""
    return copy.deepcopy(_content(kind))


def state(kind: str) -> dict[str, Tensor]:
    return dict(content(kind)["model_state"])


@functools.cache
def outputs() -> dict[str, Tensor]:
    return load_file(GOLDEN / "checkpoint_outputs.safetensors")


@functools.cache
def tokenizers() -> dict[str, Any]:
    return json.loads((GOLDEN / "tokenizers.json").read_text(encoding="utf-8"))
