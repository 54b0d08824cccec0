"""The limit of every number in a tiny configuration, by what its name says it counts."""

from __future__ import annotations

import math
import re
from typing import Any

from integration.sweep.kept_layers import read
from transformers import PreTrainedConfig

WIDTH, HEADS, HEAD_WIDTH, HIDDEN, VOCABULARY = 64, 4, 16, 96, 128

_LIMITS: list[tuple[str, int]] = [  # the first pattern that matches the whole name
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index", 1),
    (r"num_mtp_layers|num_nextn_predict_layers|num_kv_shared_layers|insert_layer_id", 0),
    (r".*(hidden_layers|_layers|n_layer|depth|num_blocks)|layers|blocks", 2),
    (r"index_topk|sliding_window(_size)?|attention_chunk_size|local_attention", 4),
    (r"(.*_)?(top_?k(_experts)?|experts_per_tok|experts_per_token|moe_k|cross_attn_k)", 2),
    (r"n_group|topk_group|num_expert_groups?", 2),
    (r".*num_(local_|routed_)?experts|n_routed_experts|.*n_experts", 4),
    (r"expert_capacity|.*(_rank|state_size|mamba_d_state)", 16),
    (r"mamba_n_heads|n_mamba_heads|mamba_num_heads", 8),  # heads of 16 fill twice the width
    (r"rotary_dim|qk_rope_head_dim", 8),
    (r".*(head_dim|d_kv|d_head|dim_head|head_size|dim_per_head)", HEAD_WIDTH),
    (r".*(num_heads|_heads|n_heads?|attention_heads|key_heads|value_heads)", HEADS),
    (r"type_vocab_size|relative_attention_num_buckets", 32),
    (r".*vocab_size.*|.*_vocab|.*codebook_size|num_embeddings|.*num_tokens", VOCABULARY),
    (r"max_source_positions", 64),
    (r"max_2d_position_embeddings", 1024),  # boxes are always given on a grid of a thousand
    (r".*(position_embeddings|_positions?|max_seq_len|n_ctx)", 256),
    (r".*(intermediate_size|ffn_dim|d_ff|dff|mlp_dim|ffn_hidden_size|n_inner)", HIDDEN),
    (r".*(intermediate_dim|feedforward_dim|dim_ff|ffn_embed_dim|dim_feedforward|d_inner)", HIDDEN),
    (r"num_queries|two_stage_num_proposals|num_query_tokens|num_denoising|num_query", 8),
    (r"latent_query_num|resampler_n_latents|num_latents", 8),
    (r"(num|n)_codebooks|num_quantizers|mm_tokens_per_image|num_conv_pos_embedding_groups", 4),
    (r"num_conv_pos_embeddings", 16),
    (
        r".*(hidden_size.*|d_model|n_embd|_dim|_dimension|embed_dim.*|emb_dim|_dims?)|dim|width|d_latents",
        WIDTH,
    ),
    (r".*(_channels?|num_filters|embedding_size|projection_size|proj_size|_units|_groups)", WIDTH),
]
_WIDTHS = r".*(sizes|dims?|channels|filters|widths?|out_features|dim_per_stage)"
_FIRST_STAGE = ("embed_dim", "embedding_size", "hidden_size", "patch_embeds_hidden_size")
_DEPTHS = r"depths|.*num_blocks|.*block_repeats|.*num_layers|layers"


def smaller_number(config: PreTrainedConfig, name: str, value: int) -> int:
    """`value` of the field `name` of a default `config`, made tiny."""
    if name == "vocab_size":
        return VOCABULARY
    if re.fullmatch(r".*(key_value_heads|kv_heads|kv_n_heads)(_per_layer)?", name):
        queries = read(config, "num_attention_heads")
        return HEADS if value == queries else min(value, 2)
    limit = next((n for pattern, n in _LIMITS if re.fullmatch(pattern, name)), None)
    if limit == HEADS and value == 3:
        return 2
    if limit is None or value <= limit:
        return value
    first_stage = hasattr(config, "depths") and name in _FIRST_STAGE
    return stage_width(value) if first_stage else limit


def smaller_list(config: PreTrainedConfig, name: str, value: list[Any]) -> list[Any]:
    """The same for a list: depths, widths and head counts of stages, numbers of each layer."""
    if not value or not all(type(v) is int for v in value):
        return value
    if re.fullmatch(_DEPTHS, name):
        # Two blocks in the first stage: shifted windows sit in every second block.
        return [min(v, 1 if i else 2) for i, v in enumerate(value)]
    if re.fullmatch(r".*heads", name):
        return [2 ** (v.bit_length() - 1) for v in value]
    if re.fullmatch(_WIDTHS, name):
        return [stage_width(v) for v in value] if max(value) >= 32 else value
    if name.endswith("_layers"):
        return value  # which layers, not how many
    return [smaller_number(config, name, v) for v in value]


def stage_width(value: int) -> int:
    """A quarter, on the nearest power of two: stages that double still double, and agree."""
    return value if value < 32 else max(2 ** round(math.log2(value)) // 4, 16)
