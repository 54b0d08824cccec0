"""Tiny sparse hosts, and inputs longer than their budget."""

from __future__ import annotations

from typing import Any

import torch
from hosts import VOCABULARY, tiny_host, tiny_inputs
from torch import Tensor
from transformers import PreTrainedModel

from gravity_hf import GravityConfig, KeyBudget, calibrate, patch_with_gravity, sparsify_attention

# Of 40 tokens a query chooses two blocks of two, beside a sink and its last three.
BUDGET = KeyBudget(top_k=8, block_size=2, window=3, sinks=1)
SINGLE = KeyBudget(top_k=8, block_size=1, window=3, sinks=1)
LENGTH = 40
WIDE = KeyBudget(top_k=2 * LENGTH)
# Hosts whose layers see the whole text.
HOSTS = ["llama", "qwen2", "qwen3", "gemma", "phi3", "gpt_neox", "gpt2", "olmo"]
HOSTS += ["queries scaled beforehand", "values narrower than keys"]
LAWS = ["force", "power", "lifted"]


def inputs_of(name: str = "qwen2", batch: int = 2, length: int = LENGTH) -> dict[str, Tensor]:
    return tiny_inputs(name, batch=batch, length=length)


def gravity_host(law: str, **overrides: Any) -> PreTrainedModel:
    """A calibrated Qwen2; "lifted" is the power law with lifted keys."""
    model = tiny_host("qwen2", **overrides)
    patch_with_gravity(model, GravityConfig(law="power" if law == "lifted" else law))
    distance = "lifted" if law == "lifted" else "euclidean"
    calibrate(model, [inputs_of(batch=1)], softness=0.5, distance=distance, progress=False)
    return model


def sparse_host(name: str, budget: KeyBudget = BUDGET, **options: Any) -> PreTrainedModel:
    """A fresh sparse model: a host's family, or a law of gravity."""
    model = gravity_host(name) if name in LAWS else tiny_host(name)
    return sparsify_attention(model, budget, **options)


def left_padded(by: int = 7) -> dict[str, Tensor]:
    """Two rows of which the second has `by` tokens of padding in front."""
    inputs = inputs_of()
    inputs["attention_mask"][1, :by] = 0
    inputs["input_ids"][1, :by] = 0
    return inputs


def edited(inputs: dict[str, Tensor], position: int) -> dict[str, Tensor]:
    """The same with another token at one position."""
    ids = inputs["input_ids"].clone()
    ids[:, position] = 3 + (ids[:, position] - 2) % (VOCABULARY - 3)
    return {**inputs, "input_ids": ids}


def continued(model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """Eight greedy tokens after each row."""
    greedy = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        text = model.generate(**inputs, **{**greedy, **options})
    return text[:, inputs["input_ids"].shape[1] :]
