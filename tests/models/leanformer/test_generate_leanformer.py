"""`generate()` with caches of every kind gives what the model gives without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from gravity_hf import RotatedQuantCache, ScreenedCache
from gravity_hf.integration.sparse_forward import KEPT, KeptScreening
from gravity_hf.models.placing import CACHE_FIELD
from gravity_hf.ops.sparse import block_means

from .lean_cases import IDS, OPTIONS, logits, padded, tiny

_NEW = 10


def greedy(model: Any, ids: Tensor, **options: Any) -> Tensor:
    given = {"max_new_tokens": _NEW, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, **given)[:, ids.shape[1] :]


@pytest.mark.parametrize("option", OPTIONS)
def test_greedy_ids_with_a_cache_are_those_without(option: str) -> None:
    model = tiny(option)
    without = greedy(model, IDS[:, :16], use_cache=False)
    assert without.unique().numel() > 2
    assert torch.equal(greedy(model, IDS[:, :16]), without)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_cache_gives_the_logits_of_the_whole(option: str) -> None:
    """In one piece, in chunks and token by token, each across the length where choosing begins."""
    model = tiny(option)
    whole = logits(model, IDS)
    for sizes in ([7, 9, 14], [11, *[1] * 19]):
        cache, found = DynamicCache(config=model.config), []
        for part in IDS.split(sizes, 1):
            found.append(logits(model, part, past_key_values=cache))
        torch.testing.assert_close(torch.cat(found, 1), whole, rtol=0, atol=2e-5)


@pytest.mark.parametrize("option", OPTIONS)
def test_a_left_padded_batch_gives_what_its_rows_give_alone(option: str) -> None:
    model, given = tiny(option), padded("left")
    batch = logits(model, given.ids, attention_mask=given.mask)
    new = greedy(model, given.ids, attention_mask=given.mask)
    for row, place in enumerate(given.rows):
        alone = given.ids[row : row + 1, place]
        torch.testing.assert_close(batch[row, place], logits(model, alone)[0], rtol=0, atol=2e-5)
        assert torch.equal(new[row], greedy(model, alone)[0])


@pytest.mark.parametrize("option", OPTIONS)
def test_a_static_cache_gives_the_ids_of_a_dynamic_one(option: str) -> None:
    model, given = tiny(option), padded("left", (16, 9))
    options = {"attention_mask": given.mask}
    static = {"cache_implementation": "static", "disable_compile": True}
    found = greedy(model, given.ids, **options, **static)
    assert torch.equal(found, greedy(model, given.ids, **options))


@pytest.mark.parametrize("option", ["blocks", "gravity", "skipped", "published"])
def test_beams_and_assistants_give_what_they_should(option: str) -> None:
    model = tiny(option)
    ids = IDS[:1, :16]
    beams = greedy(model, ids, num_beams=3)
    assert torch.equal(beams, greedy(model, ids, num_beams=3, use_cache=False))
    assistant = tiny(option, num_hidden_layers=1)
    assert torch.equal(greedy(model, ids, assistant_model=assistant), greedy(model, ids))


class Keeping(DynamicCache):
    """Hands on screening keys and means of blocks beside keys, as `ScreenedCache` does."""

    def __init__(self, model: Any, scale: float) -> None:
        super().__init__(config=model.config)
        self.attentions = [layer.self_attn for layer in model.model.layers]
        self.scale = scale

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> Any:
        keys, values = super().update(keys, values, layer_idx)
        attention = self.attentions[layer_idx]
        size, screen = attention.budget.block_size, None
        if attention.learns_to_screen:
            screen = self.scale * attention.screening.screen_keys(keys)
        means = block_means(self.scale * keys if screen is None else screen, size)
        setattr(keys, KEPT, KeptScreening(screen, means, size))
        return keys, values


@pytest.mark.parametrize("option", ["blocks", "own_keys", "gravity"])
def test_what_a_cache_keeps_of_the_screening_is_not_computed_again(option: str) -> None:
    model, found = tiny(option), []
    for cache in (DynamicCache(config=model.config), Keeping(model, 1.0), Keeping(model, -1.0)):
        parts = [logits(model, part, past_key_values=cache) for part in IDS.split([20, 1, 9], 1)]
        found.append(torch.cat(parts, 1))
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=1e-6)
    assert (found[0] - found[2]).abs().max() > 1e-3


@pytest.mark.parametrize("option", ["blocks", "gravity", "exits", "published"])
def test_other_caches_give_the_ids_of_a_dynamic_one(option: str) -> None:
    model, given = tiny(option), padded("left", (16, 9))
    expected = greedy(model, given.ids, attention_mask=given.mask)
    # Of so few tokens nothing is rounded.
    for cache in (ScreenedCache(model), RotatedQuantCache(config=model.config)):
        found = greedy(model, given.ids, attention_mask=given.mask, **{CACHE_FIELD: cache})
        assert torch.equal(found, expected)
    packed = RotatedQuantCache(config=model.config, residual=8, min_length=8, nbits_k=8, nbits_v=8)
    rounded = greedy(model, given.ids, attention_mask=given.mask, **{CACHE_FIELD: packed})
    assert packed.memory()["packed_tokens"] > 0 and rounded.shape == expected.shape


def test_sampling_is_repeatable_and_of_every_row() -> None:
    model, given = tiny(), padded("left", (16, 9))
    found = []
    for _ in range(2):
        torch.manual_seed(1)
        new = greedy(model, given.ids, attention_mask=given.mask, do_sample=True, top_k=0)
        found.append(new)
    assert torch.equal(*found) and not torch.equal(found[0][0], found[0][1])


def test_more_tokens_than_a_table_of_positions_has_are_refused_before_the_first() -> None:
    model = tiny("learned")
    with pytest.raises(ValueError, match="at most 64 tokens"):
        greedy(model, IDS[:, :16], max_new_tokens=60)
    with pytest.raises(ValueError, match="at most 64 tokens"):
        logits(model, torch.ones(1, 65, dtype=torch.long))
    assert greedy(tiny(), IDS[:, :16], max_new_tokens=60).shape == (2, 60)
