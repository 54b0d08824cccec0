"""Tiny random hosts, one per family, built from their configs."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

VOCABULARY = 97
_SMALL = {"vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 64}
_DEPTH = {"num_hidden_layers": 3, "num_attention_heads": 6, "max_position_embeddings": 128}
_TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_DECODER = {**_SMALL, **_DEPTH, **_TOKENS, "num_key_value_heads": 2, "initializer_range": 0.2}
_ENCODER = {**_SMALL, **_DEPTH, "initializer_range": 0.2, "pad_token_id": 0}

# name -> (config class, model class, arguments)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", _DECODER),
    "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {**_DECODER, "head_dim": 8}),
    "llama": ("LlamaConfig", "LlamaForCausalLM", _DECODER),
    "mistral": ("MistralConfig", "MistralForCausalLM", {**_DECODER, "sliding_window": 5}),
    "gemma": ("GemmaConfig", "GemmaForCausalLM", {**_DECODER, "head_dim": 16}),
    "phi3": ("Phi3Config", "Phi3ForCausalLM", _DECODER),
    "gpt_neox": (
        "GPTNeoXConfig",
        "GPTNeoXForCausalLM",
        {**_SMALL, **_DEPTH, **_TOKENS, "initializer_range": 0.2},
    ),
    "gpt2": (
        "GPT2Config",
        "GPT2LMHeadModel",
        {
            "vocab_size": VOCABULARY,
            "n_embd": 48,
            "n_layer": 3,
            "n_head": 6,
            "n_positions": 128,
            "initializer_range": 0.2,
            **_TOKENS,
        },
    ),
    "olmo": ("OlmoConfig", "OlmoForCausalLM", _DECODER),
    "bert": ("BertConfig", "BertForMaskedLM", _ENCODER),
    "vit": (
        "ViTConfig",
        "ViTForImageClassification",
        {
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 6,
            "image_size": 16,
            "patch_size": 4,
            "num_labels": 5,
            "initializer_range": 0.2,
        },
    ),
}
DECODERS = [name for name in FAMILIES if name not in ("bert", "vit")]


def tiny_host(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A fresh random model of the family, in eval mode."""
    config_class, model_class, arguments = FAMILIES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**{**arguments, **overrides})
    return getattr(transformers, model_class)(config).eval()


def tiny_inputs(name: str, batch: int = 2, length: int = 11, seed: int = 1) -> dict[str, Tensor]:
    """Model inputs of the family; no padding."""
    generator = torch.Generator().manual_seed(seed)
    if name == "vit":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def logits(model: torch.nn.Module, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """The model's logits without gradients."""
    with torch.no_grad():
        return model(**inputs, **options).logits
