"""Tiny gravity models with their tokenizers or processors, on disk and in memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from hosts import tiny_host, tiny_inputs
from transformers import BertTokenizer, PreTrainedModel

from gravity_hf import GravityConfig, calibrate, patch_with_gravity
from gravity_hf.layers.parameters import GravityParameters
from gravity_hf.training.tokenizers import byte_tokenizer

WORDS = ["the", "apple", "falls", "far", "from", "a", "tree", "while", "moon", "does", "not"]
_BYTES = {"vocab_size": 256, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0}


def calibrated(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> PreTrainedModel:
    """The host, patched in place and calibrated on `inputs`: lifted keys, softness 1."""
    patch_with_gravity(model, GravityConfig(learn_softening=True))
    calibrate(model, [inputs], softness=1.0, progress=False)
    return model


def byte_host() -> PreTrainedModel:
    """A byte-level Qwen2; its tokens are those of `byte_tokenizer`."""
    return tiny_host("qwen2", **_BYTES)


def byte_decoder() -> PreTrainedModel:
    """The byte-level Qwen2 under gravity."""
    return calibrated(byte_host(), tiny_inputs("qwen2", batch=4, length=12))


def word_tokenizer() -> BertTokenizer:
    """Whole words; [PAD] is token 0."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return BertTokenizer(vocab={word: i for i, word in enumerate([*special, *WORDS])})


def saved_decoder(folder: Path) -> Path:
    byte_decoder().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def masses(model: torch.nn.Module) -> list[torch.Tensor]:
    """Copies of every mass in force, in the model's order."""
    modules = (m for m in model.modules() if isinstance(m, GravityParameters))
    return [m.mass_log.detach().clone() for m in modules]


def all_differ(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    pairs = zip(before, after, strict=True)
    return bool(before) and not any(torch.equal(one, two) for one, two in pairs)


@contextmanager
def counted_calls(model: torch.nn.Module) -> Iterator[list[GravityParameters]]:
    """The gravity modules whose masses the attention asked for, one entry each time."""
    calls: list[GravityParameters] = []
    modules = [m for m in model.modules() if isinstance(m, GravityParameters)]
    hooks = [m.register_forward_hook(lambda m, *_: calls.append(m)) for m in modules]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()
