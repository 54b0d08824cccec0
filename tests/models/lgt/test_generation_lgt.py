"""Generating with an LGT: every cache and every way of choosing tokens gives the same text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import (
    DynamicCache,
    PreTrainedTokenizerFast,
    StaticCache,
    pipeline,
)

from gravity_hf.models.lgt import LGTForCausalLM

from .lgt_cases import IDS, OPTIONS, VOCABULARY, padded, tiny

CLOSE = {"atol": 3e-6, "rtol": 1e-5}
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}


def generate(model: LGTForCausalLM, **inputs: Any) -> Tensor:
    torch.manual_seed(0)
    return model.generate(**{"input_ids": IDS, **GREEDY, **inputs})


@pytest.mark.parametrize("option", OPTIONS)
def test_caches_change_no_token(option: str) -> None:
    model = tiny(**OPTIONS[option])
    without = generate(model, use_cache=False)
    assert torch.equal(generate(model), without)
    assert torch.equal(generate(model, cache_implementation="static"), without)
    left = generate(model, **padded("left"))[:, 3:]
    assert torch.equal(left, without)
    assert torch.equal(
        generate(model, **padded("left"), cache_implementation="static")[:, 3:], without
    )


@pytest.mark.parametrize(
    "way",
    [
        {"do_sample": True, "temperature": 0.7},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"logits_processor": None, "repetition_penalty": 1.5},
    ],
    ids=["sample", "beam", "beams", "penalty"],
)
def test_ways_of_choosing_do_not_need_the_cache(way: dict[str, Any]) -> None:
    model = tiny()
    cached = generate(model, **way, **padded("left"))
    assert torch.equal(cached, generate(model, **way, **padded("left"), use_cache=False))


def test_several_tokens_at_once() -> None:
    """Prompt lookup and an assistant check several tokens in one forward, and take some back."""
    model, one = tiny(), {"input_ids": IDS[:1].repeat(1, 2), "max_new_tokens": 10}
    plain = generate(model, **one)
    assert torch.equal(generate(model, **one, prompt_lookup_num_tokens=3), plain)
    assert torch.equal(generate(model, **one, assistant_model=tiny(num_hidden_layers=1)), plain)


def test_embeddings_start_a_text() -> None:
    model = tiny()
    started = model.generate(inputs_embeds=model.model.embed_tokens(IDS), **GREEDY)
    assert torch.equal(started, generate(model)[:, 9:])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("option", ["default", "exclude_self"])
def test_steps_equal_one_forward(kind: str, option: str) -> None:
    """In pieces of uneven length, at positions that do not start at 0."""
    model = tiny(**OPTIONS[option])
    places = torch.arange(9)[None].expand(2, -1) + torch.tensor([[5], [11]])
    cache: Any = DynamicCache(config=model.config)
    if kind == "static":
        cache = StaticCache(config=model.config, max_cache_len=12)
    with torch.no_grad():
        whole = model(IDS, position_ids=places).logits
        parts = [
            model(
                IDS[:, start:stop], position_ids=places[:, start:stop], past_key_values=cache
            ).logits
            for start, stop in ((0, 4), (4, 5), (5, 9))
        ]
    torch.testing.assert_close(torch.cat(parts, 1), whole, **CLOSE)


def test_cache_holds_a_mass_per_head_and_the_values() -> None:
    """`d + H` numbers per token and layer; the first layer has the positions besides."""
    model = tiny()
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS, past_key_values=cache, use_cache=True)
    first, second = cache.layers
    assert tuple(first.keys.shape) == (2, 2, 9, 2)
    assert tuple(second.keys.shape) == (2, 2, 9, 1)
    assert tuple(second.values.shape) == (2, 2, 9, 16)
    per_token = second.keys[0, :, 0].numel() + second.values[0, :, 0].numel()
    assert per_token == model.config.hidden_size + model.config.num_attention_heads


def test_half_precision_generates_with_either_cache() -> None:
    model = tiny().bfloat16()
    plain = generate(model)
    assert torch.equal(generate(model, cache_implementation="static"), plain)


def test_compiled_step_over_a_fixed_cache() -> None:
    model = tiny(num_hidden_layers=1)
    cache = StaticCache(config=model.config, max_cache_len=12)
    step = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        whole = model(torch.cat([IDS, IDS[:, :2]], 1)).logits
        model(IDS, past_key_values=cache)
        for index in range(2):
            ids, places = IDS[:, index : index + 1], torch.full((2, 1), 9 + index)
            logits = step(ids, position_ids=places, past_key_values=cache).logits
            torch.testing.assert_close(logits[:, 0], whole[:, 9 + index], **CLOSE)


def test_too_long_a_text_is_refused() -> None:
    with pytest.raises(ValueError, match="max_position_embeddings is 12.*generate fewer tokens"):
        generate(tiny(max_position_embeddings=12))


def test_inexact_caches_are_refused() -> None:
    model = tiny()
    layer = type("RoundedLayer", (type(DynamicCache(config=model.config).layers[0]),), {})
    cache = DynamicCache(config=model.config)
    cache.layers[0] = layer()
    with pytest.raises(ValueError, match="expected a DynamicCache or StaticCache, .*RoundedLayer"):
        model(IDS, past_key_values=cache)


def test_bidirectional_model_has_no_cache() -> None:
    model = tiny(is_causal=False)
    assert model(IDS, use_cache=True).past_key_values is None
    assert generate(model).shape == (2, 15)


def test_text_generation_pipeline() -> None:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w1"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="w0", eos_token="w2", padding_side="left"
    )
    model = tiny(eos_token_id=2)
    writer = pipeline("text-generation", model=model, tokenizer=tokenizer)
    texts = ["w3 w10 w17 w24", "w9 w8"]
    options = {"max_new_tokens": 3, "do_sample": False, "return_full_text": False}
    together = writer(texts, batch_size=2, **options)
    apart = [writer(text, **options) for text in texts]
    assert [t[0]["generated_text"] for t in together] == [t[0]["generated_text"] for t in apart]


@pytest.mark.parametrize("length", [1, 8])
def test_masks_that_leave_out_tokens_are_refused(length: int) -> None:
    """Once the missing end counted as padding, and the text went on without its own token."""
    model = tiny()
    with pytest.raises(ValueError, match="attention_mask: expected 9 keys"):
        model(IDS, attention_mask=torch.ones(2, length))
    for cache in (
        DynamicCache(config=model.config),
        StaticCache(config=model.config, max_cache_len=12),
    ):
        model(IDS[:, :8], past_key_values=cache)
        with pytest.raises(ValueError, match="attention_mask: expected (9|12) keys.*cached tokens"):
            model(IDS[:, 8:], past_key_values=cache, attention_mask=torch.ones(2, length))


def test_bidirectional_model_generates_what_it_computes() -> None:
    """Every token sees the new one, so that nothing can be kept."""
    model = tiny(is_causal=False)
    text = IDS
    for _ in range(3):
        text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], 1)
    for options in ({}, {"cache_implementation": "static"}):
        made = model.generate(
            IDS,
            max_new_tokens=3,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        assert torch.equal(made.sequences, text)
        torch.testing.assert_close(made.logits[-1], model(text[:, :-1]).logits[:, -1], **CLOSE)
    with pytest.raises(ValueError, match="past_key_values: expected none, as config.is_causal"):
        model(IDS, past_key_values=DynamicCache(config=model.config))


def test_prompt_in_pieces_changes_no_token() -> None:
    model = tiny()
    plain = generate(model)
    for kind in ("static", "dynamic"):
        pieces = generate(model, cache_implementation=kind, prefill_chunk_size=4)
        assert torch.equal(pieces, plain)


def test_model_without_layers_generates() -> None:
    model = tiny(num_hidden_layers=0)
    plain = generate(model, use_cache=False)
    for options in ({}, {"cache_implementation": "static"}):
        assert torch.equal(generate(model, **options), plain)
    cache = StaticCache(config=model.config, max_cache_len=12)
    assert torch.equal(model(IDS, past_key_values=cache).logits, model(IDS).logits)


@pytest.mark.parametrize("mask", [None, "ones"])
def test_packed_documents_are_not_cached(mask: str | None) -> None:
    """Whoever went on with their cache would see all of them."""
    model = tiny()
    places = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(2, -1)
    packed = {"position_ids": places, "attention_mask": mask and torch.ones(2, 9)}
    assert model(IDS, **packed).get("past_key_values") is None
    with pytest.raises(ValueError, match="expected one document per row beside a cache"):
        model(IDS, **packed, past_key_values=DynamicCache(config=model.config))
