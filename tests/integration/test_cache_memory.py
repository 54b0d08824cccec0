"""Bytes of caches, from the storages of what they hold."""

from __future__ import annotations

import torch
from transformers import DynamicCache

from gravity_hf.integration.cache_memory import cache_bytes, held_bytes, tensors_in


def test_a_storage_counts_whole_and_once() -> None:
    whole = torch.zeros(100, 4)
    assert held_bytes([whole[:1]]) == held_bytes([whole[:1], whole[50:]]) == 1600
    assert held_bytes([whole, whole.clone()]) == 3200


def test_tensors_are_found_however_deep_they_lie() -> None:
    one, two, three = (torch.zeros(n) for n in (1, 2, 3))
    found = list(tensors_in({"a": [one, (two, 7)], "b": {"c": three}, "d": None}))
    assert [len(x) for x in found] == [1, 2, 3]


def test_a_cache_of_views_is_as_large_as_what_they_are_of() -> None:
    cache = DynamicCache()
    cache.update(torch.zeros(1, 2, 10, 4), torch.zeros(1, 2, 10, 4), 0)
    assert cache_bytes(cache) == 2 * 2 * 10 * 4 * 4
    layer = cache.layers[0]
    layer.keys = layer.keys[:, :, :3]
    assert cache_bytes(cache) == 2 * 2 * 10 * 4 * 4
