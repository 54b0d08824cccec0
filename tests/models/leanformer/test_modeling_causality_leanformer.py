"""Nothing that comes later changes what came before, whatever is sparse."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from .lean_cases import IDS, OPTIONS, TOP_K, VOCABULARY, logits, padded, tiny


def changed(ids: torch.Tensor, place: int) -> torch.Tensor:
    other = ids.clone()
    other[:, place] = (other[:, place] + 11) % (VOCABULARY - 3) + 3
    return other


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("length", [TOP_K - 3, TOP_K, 30])
def test_a_later_token_changes_no_earlier_bit(option: str, length: int) -> None:
    model, ids = tiny(option), IDS[:, :length]
    before = logits(model, ids)
    for place in (1, length // 2, length - 1):
        after = logits(model, changed(ids, place))
        assert torch.equal(after[:, :place], before[:, :place])
        assert not torch.equal(after[:, place:], before[:, place:])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("option", OPTIONS)
def test_a_later_token_changes_no_earlier_bit_beside_padding(option: str, side: str) -> None:
    model, given = tiny(option), padded(side)
    before = logits(model, given.ids, attention_mask=given.mask)
    assert before.isfinite().all()
    after = logits(model, changed(given.ids, 20), attention_mask=given.mask)
    for row, place in enumerate(given.rows):
        early = slice(place.start, min(20, place.stop))
        assert torch.equal(after[row, early], before[row, early])


@pytest.mark.parametrize("option", OPTIONS)
def test_a_later_token_changes_no_earlier_bit_behind_a_cache(option: str) -> None:
    model = tiny(option)
    found = []
    for ids in (IDS, changed(IDS, 25)):
        cache = DynamicCache(config=model.config)
        logits(model, ids[:, :16], past_key_values=cache)
        found.append(logits(model, ids[:, 16:], past_key_values=cache))
    assert torch.equal(found[0][:, :9], found[1][:, :9])
    assert not torch.equal(found[0][:, 9:], found[1][:, 9:])


@pytest.mark.parametrize("option", ["blocks", "gravity", "published"])
def test_a_mask_of_four_dimensions_cannot_show_what_comes_later(option: str) -> None:
    model = tiny(option)
    everything = torch.ones(1, 1, 30, 30, dtype=torch.bool)
    shown = logits(model, IDS, attention_mask=everything)
    torch.testing.assert_close(shown, logits(model, IDS), rtol=0, atol=1e-5)


@pytest.mark.parametrize("option", ["dense", "gravity_dense", "blocks", "published"])
@pytest.mark.parametrize("in_cache", [False, True])
def test_a_token_sees_as_many_as_its_window_is_wide(option: str, in_cache: bool) -> None:
    """Itself the last; of one layer, as further layers reach further. All keys are looked at."""
    settings = {"sliding_window": 13, "num_hidden_layers": 1, "sparse_min_length": 13}
    model = tiny(option, attention_top_k=13, **settings)
    found = []
    for ids in (IDS, changed(IDS, 10)):
        cache = DynamicCache(config=model.config) if in_cache else None
        parts = ids.split([18, 1, 1, 1, 1, 1, 7] if in_cache else 30, 1)
        found.append(torch.cat([logits(model, x, past_key_values=cache) for x in parts], 1))
    reached = (found[0] != found[1]).any(-1).any(0)
    assert reached[10:23].all() and not reached[23:].any() and not reached[:10].any()


@pytest.mark.parametrize("option", OPTIONS)
def test_packed_documents_do_not_see_each_other(option: str) -> None:
    model = tiny(option)
    places = torch.cat([torch.arange(13), torch.arange(17)])[None]
    packed = logits(model, IDS[:1], position_ids=places)
    first, second = logits(model, IDS[:1, :13]), logits(model, IDS[:1, 13:])
    if model.config.attention_block > 1:
        # Blocks of a row are counted from its first token, not from that of a document.
        second, packed = second[:, :8], packed[:, :21]
    torch.testing.assert_close(packed, torch.cat([first, second], 1), rtol=0, atol=1e-5)
