"""Small hosts with sparse feed-forward layers, and text for them."""

from __future__ import annotations

import torch
from hosts import tiny_host
from torch import Tensor
from transformers import PreTrainedModel

from gravity_hf.integration.sparse_feed_forward import sparsify_feed_forward

SETTINGS = {"block_size": 8, "sparsity": 0.5, "gate_rank": 8}


def batches(count: int = 40) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 97, (4, 24), generator=generator)} for _ in range(count)]


def sparse_host(name: str = "llama", **changes: object) -> PreTrainedModel:
    return sparsify_feed_forward(tiny_host(name).eval(), **{**SETTINGS, **changes})
