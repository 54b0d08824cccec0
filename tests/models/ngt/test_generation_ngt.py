"""Generating with an NGT: every cache and every way of choosing tokens gives the same text."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

from gravity_hf.models.ngt import NGTForCausalLM
from gravity_hf.models.placing import CACHE_FIELD

from .every_case import EVERY, any_model
from .ngt_cases import IDS, padded, tiny

CLOSE = {"atol": 3e-6, "rtol": 1e-5}
GREEDY = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
# As published: the last tokens of a long text, places from a table.
CROPPING = {"coordinate_positions": "learned", "crop_long_inputs": True}


def generate(model: NGTForCausalLM, **inputs: Any) -> Tensor:
    torch.manual_seed(0)
    return model.generate(**{"input_ids": IDS, **GREEDY, **inputs})


@pytest.mark.parametrize("name", EVERY)
def test_steps_equal_one_forward(name: str) -> None:
    """Thirty tokens: a prompt, pieces of uneven length and single tokens, with either cache."""
    model = any_model(name).double()
    ids = torch.arange(60).reshape(2, 30) * 7 % 47 + 3
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        for cache, cuts in (
            (DynamicCache(config=model.config), [0, 9, *range(10, 31)]),
            (StaticCache(config=model.config, max_cache_len=32), [0, 9, 10, 14, 15, 16, 23, 30]),
        ):
            parts = [
                model(ids[:, start:stop], past_key_values=cache).logits
                for start, stop in zip(cuts, cuts[1:], strict=False)
            ]
            torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-10, rtol=0.0)


@torch.no_grad()
def test_tokens_that_are_alone_keep_themselves_in_a_fixed_cache() -> None:
    """Once a radius that left no other token in sight left nothing at all there."""
    model = tiny(cutoff="hard", initial_radius=1.0).double()
    whole = model(IDS, use_cache=False).logits
    cache = StaticCache(config=model.config, max_cache_len=12)
    parts = [model(IDS[:, at : at + 3], past_key_values=cache).logits for at in (0, 3, 6)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-10, rtol=0.0)


@pytest.mark.parametrize("name", ["v2", "reference", "symmetric", "twin, learned", "twin, alibi"])
def test_caches_change_no_token(name: str) -> None:
    model = any_model(name)
    without = generate(model, use_cache=False)
    for inputs in ({}, padded("left")):
        for kind in ("dynamic", "static"):
            found = generate(model, **inputs, cache_implementation=kind)
            assert torch.equal(found[:, -15:], without)


@pytest.mark.parametrize(
    "way",
    [{"do_sample": True, "temperature": 0.7}, {"num_beams": 3, "num_return_sequences": 2}],
    ids=["sample", "beams"],
)
def test_ways_of_choosing_do_not_need_the_cache(way: dict[str, Any]) -> None:
    """Beams take everything along that the cache keeps of them."""
    model = tiny()
    cached = generate(model, **way, **padded("left"))
    assert torch.equal(cached, generate(model, **way, **padded("left"), use_cache=False))


def test_several_tokens_at_once() -> None:
    """Prompt lookup and an assistant check several tokens in one forward, and take some back."""
    model, one = tiny(), {"input_ids": IDS[:1].repeat(1, 2), "max_new_tokens": 10}
    plain = generate(model, **one)
    assert torch.equal(generate(model, **one, prompt_lookup_num_tokens=3), plain)
    assert torch.equal(generate(model, **one, assistant_model=tiny(num_hidden_layers=1)), plain)
    assert torch.equal(generate(model, **one, prefill_chunk_size=5), plain)


def test_half_precision_generates_with_either_cache() -> None:
    """Coordinates stay float32 in a cache, whatever the values are."""
    model = tiny().bfloat16()
    cache = DynamicCache(config=model.config)
    plain = generate(model, **{CACHE_FIELD: cache})
    assert torch.equal(generate(model, cache_implementation="static"), plain)
    layer = cache.layers[0]
    assert layer.keys.dtype == torch.float32
    assert tuple(layer.keys.shape) == (2, 2, 14, model.config.head_coord_dim + 1)


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


@pytest.mark.parametrize("settings", [{}, {"attention": "dot_product", "positions": "alibi"}])
def test_computed_places_go_on(settings: dict[str, Any]) -> None:
    """Beyond max_position_embeddings: 12, where 15 are needed."""
    short, longer = (tiny(max_position_embeddings=n, **settings) for n in (12, 64))
    assert torch.equal(generate(short), generate(longer))


def test_cropping_recomputes_the_window() -> None:
    model = tiny(max_position_embeddings=12, **CROPPING)
    found = generate(model)
    for inputs in (padded("left"), {"cache_implementation": "static"}):
        assert torch.equal(generate(model, **inputs)[:, -15:], found)
    text = IDS
    for _ in range(6):
        text = torch.cat([text, model(text[:, -12:]).logits[:, -1:].argmax(-1)], 1)
    assert torch.equal(found, text)


@pytest.mark.parametrize("settings", [{"attention": "dot_product"}, {"crop_long_inputs": False}])
def test_table_that_ends_is_said_before_anything_is_computed(settings: dict[str, Any]) -> None:
    model = tiny(
        preset="reference", **{"crop_long_inputs": False, "max_position_embeddings": 12, **settings}
    )
    model.model.register_forward_pre_hook(lambda *_: pytest.fail("it was called"))
    with pytest.raises(ValueError, match=r"at most 12 tokens \(max_position_embeddings\).*got 14"):
        generate(model)


def test_room_is_counted_without_padding() -> None:
    model = tiny(max_position_embeddings=14, coordinate_positions="learned")
    assert torch.equal(generate(model, **padded("left"))[:, 3:], generate(model))


def test_misspelt_masks_are_refused() -> None:
    with pytest.raises(TypeError, match="expected attention_mask, got attention_masks"):
        tiny()(IDS, attention_masks=torch.ones_like(IDS))


def test_inexact_caches_are_refused() -> None:
    model = tiny()
    cache = DynamicCache(config=model.config)
    cache.layers[0] = type("RoundedLayer", (type(cache.layers[0]),), {})()
    with pytest.raises(ValueError, match="expected a DynamicCache or StaticCache, .*RoundedLayer"):
        model(IDS, past_key_values=cache)


def test_packed_documents_are_not_cached() -> None:
    """Whoever went on with their cache would see all of them."""
    model = tiny()
    packed = {"position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]).expand(2, -1)}
    assert model(IDS, **packed).get("past_key_values") is None
    with pytest.raises(ValueError, match="expected one document per row beside a cache"):
        model(IDS, **packed, past_key_values=DynamicCache(config=model.config))
