"""Presets, names and refusals of a LeanFormer's settings, and what they count."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from gravity_hf import LeanFormerConfig, LeanFormerForCausalLM, sparsity
from gravity_hf.models.leanformer import LEANFORMER_PRESETS

from .lean_cases import SMALL, tiny

# V / d / H / L / F / T; attention and feed-forward rank; screening; k; gate; sparsity: parameters.
_PUBLISHED = {
    "tiny": (50257, 128, 4, 4, 512, 256, 16, 4, 32, 4, 0.7, 7_488_977),
    "small": (50257, 512, 8, 12, 2048, 1024, 32, 8, 64, 8, 0.8, 32_945_441),
    "39M": (50257, 512, 8, 12, 2048, 512, 64, 16, 64, 16, 0.8, 39_198_529),
    "66M": (50257, 768, 12, 12, 3072, 512, 96, 24, 96, 24, 0.8, 66_207_457),
    "66M, 32000": (32000, 768, 12, 12, 3072, 512, 96, 24, 96, 24, 0.8, 50_433_409),
    "204M": (32000, 1536, 24, 20, 6144, 512, 192, 48, 96, 48, 0.8, 204_227_329),
    "demo": (32000, 256, 4, 6, 1024, 256, 24, 6, 32, 6, 0.75, 9_992_577),
}
_NAMES = (
    *("vocab_size", "d_model", "n_heads", "n_layers", "d_ff", "max_seq_len", "attention_rank"),
    *("screening_rank", "attention_top_k", "ff_gate_rank", "ff_sparsity_target"),
)


def on_meta(config: LeanFormerConfig) -> LeanFormerForCausalLM:
    with torch.device("meta"):
        return LeanFormerForCausalLM(config)


@pytest.mark.parametrize("name", _PUBLISHED)
def test_published_shapes_have_the_published_numbers_of_parameters(name: str) -> None:
    *sizes, count = _PUBLISHED[name]
    named = dict(zip(_NAMES, sizes, strict=True))
    config = LeanFormerConfig(compat_reference=True, ff_rank=named["attention_rank"], **named)
    model = on_meta(config)
    assert sum(x.numel() for x in model.parameters()) == count
    assert len(list(model.parameters())) == 33 * named["n_layers"] + 10


@pytest.mark.parametrize("name", LEANFORMER_PRESETS)
@pytest.mark.parametrize("settings", [{}, {"attention": "gravity"}, {"compat_reference": True}])
def test_presets_can_be_built(name: str, settings: dict[str, Any]) -> None:
    given = {"local_window": 1, "sink_tokens": 0, **settings} if settings else settings
    if "compat_reference" not in settings:
        given = settings
    config = LeanFormerConfig.from_preset(name, **given)
    again = LeanFormerConfig.from_dict(config.to_dict())
    assert again.to_dict() == config.to_dict()
    assert sum(x.numel() for x in on_meta(config).parameters()) > 1e6


def test_published_names_are_settings() -> None:
    config = LeanFormerConfig(d_model=64, n_heads=4, n_layers=3, n_kv_heads=2, ff_rank=7)
    assert (config.hidden_size, config.num_attention_heads, config.head_dim) == (64, 4, 16)
    assert (config.num_hidden_layers, config.num_key_value_heads) == (3, 2)
    assert config.feed_forward_rank == 7 and config.d_ff == config.intermediate_size
    with pytest.raises(ValueError, match="one of"):
        LeanFormerConfig.from_preset("huge")
    with pytest.raises(ValueError, match="Did you mean attention_top_k"):
        LeanFormerConfig(atention_top_k=4)


def test_the_published_form_implies_its_settings() -> None:
    config = LeanFormerConfig(compat_reference=True)
    assert (config.position, config.norm, config.head_rank) == ("learned", "layer", 64)
    assert config.attention_bias and config.mlp_bias and not config.tie_word_embeddings
    assert config.feed_forward_block == 1 and config.rope_parameters is None


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_attention_heads": 7}, "hidden_size: expected a multiple of num_attention_heads"),
        ({"num_key_value_heads": 3}, "num_attention_heads: expected a multiple of 3"),
        ({"num_attention_heads": 0}, "num_attention_heads: expected an integer >= 1"),
        ({"attention_rank": -1}, "attention_rank: expected an integer >= 0"),
        ({"attention_top_k": 3}, "attention_top_k: expected >= local_window"),
        ({"feed_forward_sparsity": 1.0}, r"feed_forward_sparsity: expected a number in \[0, 1\)"),
        ({"feed_forward_block": 7}, "feed_forward_block: expected a divisor of"),
        ({"min_depth": 4}, "min_depth: expected at most num_hidden_layers"),
        ({"exit_threshold": 1.5}, "exit_threshold: expected None or a probability"),
        ({"exit_heads": False, "exit_threshold": 0.5}, "None beside exit_heads=False"),
        ({"attention": "magnetism"}, "attention: expected one of"),
        ({"gravity_strength": 2.0}, "gravity_strength: expected 3.5, beside attention="),
        ({"attention": "gravity", "gravity_softening": 0.0}, "gravity_softening: expected a sq"),
        ({"head_dim": 7}, "head_dim: expected an even number"),
        ({"hidden_act": "sillu"}, "hidden_act: expected a name"),
        ({"screen_dim": 9}, "screen_dim: expected at most head_dim"),
        ({"tie_word_embeddings": True, "head_rank": 4}, "tie_word_embeddings: expected False"),
        ({"rank_pattern": {"q_proj": -1}}, "rank_pattern: expected an integer >= 0 for 'q_proj'"),
        ({"rank_pattern": {"query": 4}}, "rank_pattern: expected names of maps"),
        ({"rank_pattern": {"layers.3.mlp.up_proj": 4}}, "rank_pattern: expected names of maps"),
        ({"compat_reference": True, "position": "rope", "attention": "gravity"}, "attention: exp"),
        ({"compat_reference": True, "local_window": 4}, "local_window: expected 1 beside compat"),
        (
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            "no partial_rotary_factor",
        ),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], expected: str) -> None:
    published = {"local_window": 1, "sink_tokens": 0, "feed_forward_block": 1}
    base = {**SMALL, **published} if "compat_reference" in settings else SMALL
    with pytest.raises((ValueError, StrictDataclassError), match=expected):
        LeanFormerConfig(**{**base, **settings})


def test_the_longest_name_that_fits_says_the_rank() -> None:
    pattern = {"o_proj": 0, "model.layers.1.self_attn.o_proj": 3, "lm_head": 5}
    model = tiny(rank_pattern=pattern)
    first, second = (layer.self_attn for layer in model.model.layers[:2])
    assert isinstance(first.o_proj, torch.nn.Linear) and second.o_proj.rank == 3
    assert first.q_proj.rank == 8 and model.lm_head.rank == 5


def test_efficiency_counts_what_is_there() -> None:
    model = tiny("blocks", feed_forward_policy="masked")
    found = model.efficiency(30)
    assert found["parameters"] == sum(x.numel() for x in model.parameters())
    # Four maps of 32 x 32, three of 32 x 32, and two norms, in three layers.
    assert found["dense_layer_parameters"] == 3 * (7 * 32 * 32 + 2 * 32)
    same = tiny("dense", attention_rank=0, feed_forward_rank=0, exit_heads=False)
    extra = sum(x.numel() for n, x in same.named_parameters() if "predictor" in n)
    assert found["dense_parameters"] == sum(x.numel() for x in same.parameters()) - extra
    assert found["layer_compression"] == 3 * 7232 / found["layer_parameters"]
    assert (found["neurons"], found["computed_neurons"]) == (0.5, 1.0)
    assert model.efficiency(12)["pairs"] == 1.0 == model.efficiency(12)["pairs_with_screening"]
    expected = (12 * 13 / 2 + 18 * 12) / (30 * 31 / 2)
    assert found["pairs"] == expected
    assert found["pairs_with_screening"] == pytest.approx(expected + 4 / 8 / 3)
    with sparsity(model, feed_forward="block", attention="dense"):
        changed = model.efficiency(30)
    assert (changed["pairs"], changed["computed_neurons"]) == (1.0, 0.5)
    assert tiny("published").efficiency(30)["pairs_with_screening"] == 1.25
