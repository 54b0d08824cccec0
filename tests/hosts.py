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
_CROSS = {
    "vocab_size": VOCABULARY,
    "d_model": 48,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "init_std": 0.2,
}
_LATENT = {
    **_DECODER,
    "num_key_value_heads": 6,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "first_k_dense_replace": 1,
}
# Hosts with something of their own: what it is -> (config class, model class, arguments).
PECULIAR: dict[str, tuple[str, str, dict[str, Any]]] = {
    "cross attention": ("BartConfig", "BartForConditionalGeneration", _CROSS),
    "queries scaled beforehand": (
        "OPTConfig",
        "OPTForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 48,
            "ffn_dim": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 48,
            "init_std": 0.2,
        },
    ),
    "scaling from the config": (
        "GraniteConfig",
        "GraniteForCausalLM",
        {**_DECODER, "attention_multiplier": 0.2},
    ),
    "values narrower than keys": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        _LATENT,
    ),
    "one module called by all layers": (
        "AlbertConfig",
        "AlbertForMaskedLM",
        {**_ENCODER, "embedding_size": 16},
    ),
    "linear attention between": (
        "Qwen3NextConfig",
        "Qwen3NextForCausalLM",
        {
            **_DECODER,
            "num_hidden_layers": 4,
            "head_dim": 12,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
        },
    ),
    "a cap on the scores": (
        "Gemma2Config",
        "Gemma2ForCausalLM",
        {
            **_DECODER,
            "head_dim": 8,
            "attn_logit_softcapping": 1.5,
            "query_pre_attn_scalar": 4,
            "sliding_window": 5,
            # The only attention of the host that has the cap in every version.
            "attn_implementation": "eager",
        },
    ),
    "attention sinks": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {
            **_DECODER,
            "head_dim": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 2,
            "sliding_window": 5,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
    ),
    "a learned position bias": (
        "T5Config",
        "T5ForConditionalGeneration",
        {
            "vocab_size": VOCABULARY,
            "d_model": 48,
            "d_kv": 8,
            "d_ff": 64,
            "num_layers": 2,
            "num_heads": 4,
            "initializer_factor": 1.5,
            "decoder_start_token_id": 0,
        },
    ),
    "keys chosen by an indexer": (
        "DeepseekV32Config",
        "DeepseekV32ForCausalLM",
        # No experts: a router's choice may change with a rounding, which is not attention's doing.
        {
            **_LATENT,
            "first_k_dense_replace": 3,
            "index_topk": 5,
            "index_n_heads": 2,
            "index_head_dim": 16,
        },
    ),
    "window-wise position bias": (
        "SwinConfig",
        "SwinForImageClassification",
        {
            "image_size": 16,
            "patch_size": 2,
            "embed_dim": 16,
            "depths": [2],
            "num_heads": [2],
            "window_size": 4,
            "initializer_range": 0.5,
        },
    ),
}
DECODERS = [name for name in FAMILIES if name not in ("bert", "vit")]


def tiny_host(name: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A fresh random model of the family, in eval mode."""
    config_class, model_class, arguments = {**FAMILIES, **PECULIAR}[name]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**{**arguments, **overrides})
    return getattr(transformers, model_class)(config).eval()


def tiny_inputs(name: str, batch: int = 2, length: int = 11, seed: int = 1) -> dict[str, Tensor]:
    """Model inputs of the family; no padding."""
    generator = torch.Generator().manual_seed(seed)
    if name in ("vit", "window-wise position bias"):
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pairs = ("cross attention", "a learned position bias")
    return {**inputs, "decoder_input_ids": ids} if name in pairs else inputs


def logits(model: torch.nn.Module, inputs: dict[str, Tensor], **options: Any) -> Tensor:
    """The model's logits without gradients."""
    with torch.no_grad():
        return model(**inputs, **options).logits
