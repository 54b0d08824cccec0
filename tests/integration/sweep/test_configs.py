"""Tiny models: small, alive, reproducible, and of the kinds that the full model has."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from integration.sweep.configs import NotBuilt, tiny_config, tiny_model
from transformers import EncoderDecoderConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from gravity_hf.integration.sites import routes_through_interface

# Model type -> its class and the attention classes that the tiny model must still have.
KINDS = {
    "qwen2": ("Qwen2ForCausalLM", {"Qwen2Attention"}),
    "bert": ("BertForMaskedLM", {"BertSelfAttention"}),
    "bart": ("BartForConditionalGeneration", {"BartAttention"}),
    "qwen2_vl": ("Qwen2VLForConditionalGeneration", {"Qwen2VLAttention", "VisionAttention"}),
    "gemma4": ("Gemma4ForConditionalGeneration", {"Gemma4TextAttention", "Gemma4VisionAttention"}),
    "detr": ("DetrForObjectDetection", {"DetrSelfAttention", "DetrCrossAttention"}),
    "internlm3": ("LlamaForCausalLM", {"LlamaAttention"}),  # an alias without classes
}


@pytest.fixture(scope="module", params=sorted(set(KINDS) & set(CONFIG_MAPPING.keys())))
def built(request):
    return request.param, tiny_model(request.param)


def test_the_model_has_a_head_and_every_attention_of_its_type(built):
    model_type, model = built
    name, attention = KINDS[model_type]
    assert type(model).__name__ == name
    routed = {type(m).__name__ for m in model.modules() if routes_through_interface(type(m))}
    assert routed == attention


def test_the_model_is_small_finite_and_for_evaluation(built):
    _, model = built
    assert sum(p.numel() for p in model.parameters()) < 3_000_000
    assert not model.training
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32, name
        assert parameter.isfinite().all(), name


def test_no_parameter_is_constant(built):
    """A gate at zero or a layer scale near it would hide what attention does."""
    _, model = built
    constant = [n for n, p in model.named_parameters() if p.numel() > 1 and p.std() == 0]
    assert constant == []


def test_a_decoder_beside_an_encoder_attends_to_it():
    try:
        EncoderDecoderConfig()
    except ValueError:
        pytest.skip("parts without defaults in this transformers")
    model = tiny_model("encoder-decoder")
    routed = {type(m).__name__ for m in model.modules() if routes_through_interface(type(m))}
    assert routed == {"BertSelfAttention", "BertCrossAttention"}


@pytest.mark.parametrize("model_type", ["qwen2", "mllama_text_model"])
def test_a_seed_gives_the_same_model_and_leaves_the_generator_alone(model_type):
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, again, other = (tiny_model(model_type, seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    pairs = list(zip(first.parameters(), again.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert not any(torch.equal(a, c) for a, _, c in pairs)


@pytest.mark.parametrize(
    ("model_type", "kinds"),
    [
        ("gemma3_text", {"sliding_attention", "full_attention"}),
        ("qwen3_next", {"linear_attention", "full_attention"}),
        ("jamba", {"linear_attention", "full_attention"}),
        ("gemma4_text", {"sliding_attention", "full_attention"}),
    ],
)
def test_one_layer_of_every_kind_stays(model_type, kinds):
    config = tiny_config(model_type)
    assert set(config.layer_types) == kinds
    assert config.num_hidden_layers == len(config.layer_types) <= 5


def test_single_layers_keep_what_is_their_own():
    config = tiny_config("gemma4_text")
    widths = {kind: config.per_layer_config[kind].head_dim for kind in set(config.layer_types)}
    assert widths["full_attention"] == 2 * widths["sliding_attention"]


def test_special_tokens_are_words_and_the_same_in_every_part():
    config = tiny_config("qwen2_vl")
    text = config.text_config
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    numbers = {getattr(config, name) for name in names} | {text.bos_token_id, text.eos_token_id}
    assert len(numbers) == 6
    assert max(numbers) < text.vocab_size


NO_TIMM = pytest.mark.skipif(importlib.util.find_spec("timm") is not None, reason="timm is here")


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("idefics_vision", "no model class"),
        ("no_such_type", "not a model type of this transformers"),
        pytest.param("timm_wrapper", "needs timm", marks=NO_TIMM),
    ],
)
def test_a_type_that_cannot_be_built_says_why(model_type, reason):
    with pytest.raises(NotBuilt) as caught:
        tiny_model(model_type)
    assert str(caught.value) == reason
