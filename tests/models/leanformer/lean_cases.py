"""Tiny LeanFormers of every kind, whose choices matter, and padded inputs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gravity_hf import LeanFormerConfig, LeanFormerForCausalLM

VOCABULARY = 50
TOP_K = 12
IDS = torch.arange(60).reshape(2, 30) * 7 % 47 + 3
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "max_position_embeddings": 64,
    "attention_rank": 8,
    "feed_forward_rank": 8,
    "screen_dim": 4,
    "attention_top_k": TOP_K,
    "local_window": 4,
    "sink_tokens": 2,
    "feed_forward_block": 8,
    "feed_forward_sparsity": 0.5,
    "gate_rank": 4,
    "min_depth": 1,
    "screening_rows": 8,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
# Every setting that changes what a token sees or how.
OPTIONS: dict[str, dict[str, Any]] = {
    "single_keys": {},
    "blocks": {"attention_block": 3},
    "shared_heads": {"num_key_value_heads": 2, "attention_block": 2},
    "own_keys": {"screening": "keys"},
    "dense": {"screening": "none"},
    "gravity": {"attention": "gravity"},
    "force": {"attention": "gravity", "gravity_law": "force", "learn_softening": False},
    "gravity_dense": {"attention": "gravity", "screening": "none"},
    "masked": {"feed_forward_policy": "masked"},
    "skipped": {"feed_forward_policy": "block", "attention_rank": 0, "feed_forward_rank": 0},
    "window": {"sliding_window": 10, "attention_block": 2, "attention_top_k": 8},
    "learned": {"position": "learned", "norm": "layer", "qk_norm": True},
    "exits": {"exit_threshold": 0.5},
}
PUBLISHED: dict[str, Any] = {
    "compat_reference": True,
    "attention_top_k": TOP_K,
    "local_window": 1,
    "sink_tokens": 0,
    "feed_forward_block": 1,
    "feed_forward_policy": "masked",
}
OPTIONS["published"] = PUBLISHED


def tiny(option: str = "single_keys", **settings: Any) -> LeanFormerForCausalLM:
    """In evaluation, with parameters far enough from a new model's that choices differ."""
    torch.manual_seed(0)
    config = LeanFormerConfig(**{**SMALL, **OPTIONS[option], **settings})
    model = LeanFormerForCausalLM(config).eval()
    with torch.no_grad():
        for name, value in model.named_parameters():
            if value.dim() > 1 and "layers" in name:
                value.mul_(1.5)
            if name == "model.exit_head.up.weight":
                # Tokens differ in how sure it is.
                value.mul_(20.0)
    return model


class Padded(NamedTuple):
    """Rows of different lengths in one batch."""

    ids: Tensor
    mask: Tensor
    # Where the tokens of each row stand.
    rows: tuple[slice, ...]


def padded(side: str, lengths: tuple[int, ...] = (30, 17)) -> Padded:
    """Rows of `IDS`, padded on one side."""
    longest = max(lengths)
    ids, mask = torch.zeros(2, longest, dtype=torch.long), torch.zeros(2, longest, dtype=torch.long)
    rows = []
    for row, length in enumerate(lengths):
        place = slice(longest - length, longest) if side == "left" else slice(0, length)
        ids[row, place] = IDS[row, :length]
        mask[row, place] = 1
        rows.append(place)
    return Padded(ids, mask, tuple(rows))


def logits(model: LeanFormerForCausalLM, ids: Tensor, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(ids, **options).logits
