"""Which positions the tokens of a forward take, and which keys they see."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..placing import check_cache, checked_position_ids, common_rows, without_padding
from ..visibility import Visibility, has_values, visibility
from .law import Law


class Tokens(NamedTuple):
    """Where the tokens of a forward stand.

    places: position ids of the queries `[b, T]`, b being 1 where all rows have the same; None: a
    whole sequence, counted from 0. key_places: of the keys `[b, Tk]`; None: the queries are the
    keys. stored: what a cache keeps of the queries, `[b, T]`; None without one.
    """

    places: Tensor | None
    key_places: Tensor | None
    stored: Tensor | None
    visible: Visibility


def place_tokens(
    law: Law,
    embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Any,
    packed: Tensor | None,
) -> Tokens:
    """Places and visibility of the tokens in `embeds` `[B, T, d]`.

    Arguments as in `LGTModel.forward`; `packed`: key ranges of documents packed into a row.

    Raises:
        ValueError: more positions than the model has, or arguments that do not fit.
    """
    batch, length = embeds.shape[:2]
    plain = cache is None and position_ids is None
    if plain:
        _check_length(law, length)
    if plain and attention_mask is None:
        return Tokens(None, None, None, Visibility(law.is_causal, None, None, law.exclude_self))
    past, slots, keys = 0, None, length
    if cache is not None:
        check_cache(cache, "an LGT keeps masses and positions")
        past = cache.get_seq_length()
        if cache.is_compileable:
            slots = torch.arange(length, device=embeds.device) + past
            keys = cache.get_max_length(0)
        else:
            keys = past + length
    visible = visibility(
        causal=law.is_causal,
        exclude_self=law.exclude_self,
        attention_mask=attention_mask,
        keys=keys,
        slots=slots,
        packed=packed,
    )
    counted = None
    if position_ids is None:
        counted = torch.arange(length, device=embeds.device)[None] + past
        places = without_padding(attention_mask, counted, slots)
    else:
        places = checked_position_ids(position_ids, batch, length)
    _check_highest(law, places)
    if slots is None and isinstance(past, int) and past == 0:
        whole = places is counted
        shown = None if whole else common_rows(places)
        return Tokens(shown, None, None if cache is None else places, visible)
    key_places = _with_cached(cache, places, batch, slots)
    return Tokens(common_rows(places), common_rows(key_places), places, visible)


def _with_cached(cache: Any, places: Tensor, batch: int, slots: Tensor | None) -> Tensor:
    """Position ids of all keys `[B, Tk]`: those in the cache, and the new ones."""
    places = places.expand(batch, -1)
    layer = cache.layers[0]
    if not layer.is_initialized:
        if slots is None:
            return places
        empty = places.new_zeros(batch, cache.get_max_length(0))
        return empty.index_copy(1, slots, places)
    cached = layer.keys[:, 0, :, 1].round().long()
    return torch.cat([cached, places], -1) if slots is None else cached.index_copy(1, slots, places)


def _check_length(law: Law, length: int) -> None:
    limit = law.max_position_embeddings
    if length > limit:
        raise ValueError(
            f"LGT: expected at most {limit} tokens (max_position_embeddings), got {length}. "
            "Shorten the input: there are no positions beyond"
        )


def _check_highest(law: Law, places: Tensor) -> None:
    if not has_values(places) or places.numel() == 0:
        return
    limit = law.max_position_embeddings
    low, high = (int(bound) for bound in places.aminmax())
    if low < 0 or high >= limit:
        raise ValueError(
            f"LGT: expected positions 0 to {limit - 1} (max_position_embeddings is {limit}), got "
            f"{low} to {high}. Shorten the input, or generate fewer tokens"
        )
