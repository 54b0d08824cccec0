"""How many heads an attention module has, wherever its makers say so."""

from __future__ import annotations

import importlib
from types import SimpleNamespace

import pytest
from torch import nn
from transformers import PreTrainedConfig

from gravity_hf.integration.sites import head_counts, routes_through_interface


def built(file, name, *arguments, **settings):
    """An attention module of transformers on a config that has these settings only."""
    module = importlib.import_module(f"transformers.models.{file}.modeling_{file}")
    return getattr(module, name)(PreTrainedConfig(**settings), *arguments)


DETR = {"num_attention_heads": 8, "encoder_attention_heads": 8}


@pytest.mark.parametrize(
    "file, name, arguments, settings, expected",
    [
        (
            "rf_detr",
            "RfDetrAttention",
            (0,),
            {
                "d_model": 32,
                "num_attention_heads": 8,
                "decoder_self_attention_heads": 4,
                "attention_dropout": 0.0,
                "attention_bias": True,
            },
            (4, 4),
        ),
        # The config's count is the encoder's; the decoder's modules are told their own.
        ("detr", "DetrSelfAttention", (32, 4), DETR, (4, 4)),
        ("conditional_detr", "ConditionalDetrDecoderSelfAttention", (32, 4), DETR, (4, 4)),
        # Attention between channels, in groups.
        (
            "florence2",
            "Florence2VisionChannelAttention",
            (1,),
            {
                "embed_dim": [16, 32],
                "num_groups": [2, 4],
                "num_heads": [1, 2],
                "qkv_bias": True,
            },
            (4, 4),
        ),
        # A gate doubles the width of the query projection.
        (
            "qwen3_5",
            "Qwen3_5Attention",
            (0,),
            {
                "hidden_size": 32,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "head_dim": 8,
                "attention_dropout": 0.0,
                "attention_bias": False,
                "rms_norm_eps": 1e-6,
            },
            (4, 2),
        ),
        # All heads share one key.
        (
            "gpt_bigcode",
            "GPTBigCodeAttention",
            (),
            {
                "hidden_size": 32,
                "num_attention_heads": 4,
                "multi_query": True,
                "scale_attn_weights": True,
                "attention_softmax_in_fp32": True,
                "scale_attention_softmax_in_fp32": True,
                "attn_pdrop": 0.0,
                "resid_pdrop": 0.0,
            },
            (4, 1),
        ),
    ],
)
def test_head_counts_are_those_of_the_module(file, name, arguments, settings, expected):
    module = built(file, name, *arguments, **settings)
    assert routes_through_interface(type(module))
    assert head_counts(name, module) == expected


def test_a_count_for_every_layer_is_read_by_the_layer():
    module = nn.Module()
    module.config, module.layer_idx = SimpleNamespace(num_attention_heads=[4, 8, 6]), 1
    assert head_counts("layer", module) == (8, 8)


def test_a_module_that_tells_no_count_is_refused_by_name():
    with pytest.raises(ValueError, match=r"blocks\.0 \(Module\): expected its number of heads"):
        head_counts("blocks.0", nn.Module())
