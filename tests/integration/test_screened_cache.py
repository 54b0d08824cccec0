"""ScreenedCache is a cache like any other, for any model, and keeps what chooses keys."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hosts import tiny_host
from integration.sparse_cases import (
    BUDGET,
    SINGLE,
    continued,
    inputs_of,
    left_padded,
    sparse_host,
)
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from gravity_hf import ScreenedCache
from gravity_hf.integration import sparse_forward
from gravity_hf.integration.sparse_forward import KEPT

KINDS: dict[str, dict[str, Any]] = {
    "keys": {},
    "single keys": {"budget": SINGLE},
    "learned": {"screening": "learned", "screen_dim": 4},
}


@functools.cache
def sparse(kind: str, name: str = "qwen2") -> PreTrainedModel:
    torch.manual_seed(0)
    return sparse_host(name, **{"budget": BUDGET, **KINDS[kind]})


def decoded(model: PreTrainedModel, cache: Any, ids: Tensor, prompt: int) -> Tensor:
    """Logits after the prompt, token by token."""
    with torch.no_grad():
        rows = [model(ids[:, :prompt], past_key_values=cache, use_cache=True).logits[:, -1:]]
        for token in ids[:, prompt:].split(1, 1):
            rows.append(model(token, past_key_values=cache, use_cache=True).logits)
    return torch.cat(rows, 1)


@pytest.mark.parametrize("name", ["qwen2", "gpt2", "mistral", "linear attention between"])
def test_a_dense_host_computes_with_it_what_it_computes_without(name):
    model, ids = tiny_host(name), inputs_of(name)["input_ids"]
    expected = decoded(model, DynamicCache(config=model.config), ids, 20)
    assert torch.equal(decoded(model, ScreenedCache(model), ids, 20), expected)
    assert torch.equal(decoded(model, ScreenedCache(config=model.config), ids, 20), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["qwen2", "lifted"])
def test_what_is_kept_chooses_the_same_keys(name, kind):
    model, ids = sparse(kind, name), inputs_of()["input_ids"]
    expected = decoded(model, DynamicCache(config=model.config), ids, 13)
    torch.testing.assert_close(decoded(model, ScreenedCache(model), ids, 13), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_padded_rows_and_beams_generate_the_same(kind):
    model, inputs = sparse(kind), left_padded()
    for options in ({}, {"num_beams": 3}):
        expected = continued(model, inputs, use_cache=False, **options)
        found = continued(model, inputs, past_key_values=ScreenedCache(model), **options)
        assert torch.equal(found, expected)


def test_kept_means_are_used(monkeypatch):
    seen = []
    inner = sparse_forward.sparse_attention

    def spy(*args: Any, **kwargs: Any) -> Tensor:
        seen.append(kwargs["means"])
        return inner(*args, **kwargs)

    monkeypatch.setattr(sparse_forward, "sparse_attention", spy)
    model, ids = sparse("learned"), inputs_of()["input_ids"]
    decoded(model, ScreenedCache(model), ids, 38)
    assert [x.shape[2] for x in seen] == [19] * 3 + [20] * 6
    decoded(model, ScreenedCache(config=model.config), ids, 39)
    assert seen[9:] == [None] * 6


@pytest.mark.parametrize("kind", ["keys", "learned"])
def test_rows_and_lengths_change_as_in_a_dynamic_cache(kind):
    model, ids = sparse(kind), inputs_of()["input_ids"]
    caches = [DynamicCache(config=model.config), ScreenedCache(model)]
    results = []
    for cache in caches:
        decoded(model, cache, ids[:, :30], 25)
        cache.crop(-7)
        assert cache.get_seq_length() == 23
        decoded(model, cache, ids[:, 30:36], 1)
        cache.batch_repeat_interleave(2)
        cache.reorder_cache(torch.tensor([3, 0, 2, 2]))
        cache.batch_select_indices(torch.tensor([0, 3]))
        results.append(decoded(model, cache, ids[:, 36:], 1))
    torch.testing.assert_close(*results)
    caches[1].reset()
    assert caches[1].get_seq_length() == 0 and caches[1].memory()["bytes"] == 0
    again = decoded(model, caches[1], ids, 20)
    assert torch.equal(again, decoded(model, ScreenedCache(model), ids, 20))


def test_buffers_grow_by_half_and_not_for_every_token():
    model, ids = tiny_host("qwen2"), inputs_of(length=100)["input_ids"]
    cache, places = ScreenedCache(model), []
    with torch.no_grad():
        for token in ids.split(1, 1):
            model(token, past_key_values=cache, use_cache=True)
            places.append(cache.layers[0].keys.untyped_storage().data_ptr())
    assert len(set(places)) == 2  # room for 64, then for 128


def test_memory_is_that_of_the_storages():
    model = sparse("learned")
    cache = ScreenedCache(model)
    decoded(model, cache, inputs_of()["input_ids"], 30)
    # 3 layers, 2 rows, 2 key-value heads; room for 64 tokens and 64 blocks; float32.
    places = 3 * 2 * 2 * 64 * 4
    assert cache.memory() == {
        "keys_values": places * 2 * 8,
        "screening": places * (4 + 4),
        "bytes": places * (16 + 8),
    }
    shown = cache.layers[0].keys
    assert getattr(shown, KEPT).keys.shape[2] == 40 and getattr(shown, KEPT).means.shape[2] == 20


def test_a_cache_filled_in_inference_mode_goes_on_outside_of_it():
    model, ids = sparse("keys"), inputs_of()["input_ids"]
    cache = ScreenedCache(model)
    with torch.inference_mode():
        model(ids[:, :30], past_key_values=cache, use_cache=True)
    with torch.no_grad():
        after = model(ids[:, 30:31], past_key_values=cache, use_cache=True).logits
    expected = decoded(model, DynamicCache(config=model.config), ids[:, :31], 30)
    torch.testing.assert_close(after[:, -1], expected[:, -1])
