"""Which positions the tokens of a forward take, and which keys they see."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticLayer

from .law import Law
from .visibility import Visibility, has_values, packed_documents, visibility


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
        _check_cache(cache)
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
        places = _without_padding(attention_mask, counted, slots)
    else:
        places = _checked(position_ids, batch, length)
    _check_highest(law, places)
    if slots is None and isinstance(past, int) and past == 0:
        whole = places is counted
        shown = None if whole else _common_rows(places)
        return Tokens(shown, None, None if cache is None else places, visible)
    key_places = _with_cached(cache, places, batch, slots)
    return Tokens(_common_rows(places), _common_rows(key_places), places, visible)


def documents_of(
    position_ids: Tensor | None, attention_mask: Tensor | None, cache: Any, batch: int, length: int
) -> Tensor | None:
    """Key ranges of the documents that are packed into a row, see `packed_documents`.

    Raises:
        ValueError: a cache beside them: whoever goes on with it would see all of them.
    """
    # One token is one document; and in a graph nobody could look and refuse.
    if position_ids is None or (
        cache is not None and (length == 1 or not has_values(position_ids))
    ):
        return None
    if cache is not None and attention_mask is not None and attention_mask.dim() == 2:
        past = int(cache.get_seq_length())
        attention_mask = attention_mask[:, past : past + length]
    packed = packed_documents(_checked(position_ids, batch, length), attention_mask)
    if packed is not None and cache is not None:
        raise ValueError(
            "position_ids: expected one document per row beside a cache, got positions that start "
            "again. Leave the cache out (use_cache=False), or give each document a row"
        )
    return packed


def _without_padding(mask: Tensor | None, counted: Tensor, slots: Tensor | None) -> Tensor:
    """Position ids that count the visible tokens only; `counted` where that is the same."""
    if mask is None or mask.dim() != 2:
        return counted
    seen = (mask != 0).long()
    places = (seen.cumsum(-1) - 1).clamp(min=0)
    length = counted.shape[1]
    if slots is None:
        places, seen = places[:, -length:], seen[:, -length:]
    else:
        places, seen = places[:, slots], seen[:, slots]
    # Padding on the right moves nobody, and where it stands itself does not matter.
    if has_values(places) and bool(((places == counted) | (seen == 0)).all()):
        return counted
    return places


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


def _check_cache(cache: Any) -> None:
    kind = type(cache.layers[0]) if cache.layers else DynamicLayer
    if kind not in (DynamicLayer, StaticLayer):
        raise ValueError(
            f"past_key_values: expected a DynamicCache or StaticCache, got {type(cache).__name__} "
            f"of {kind.__name__}: an LGT keeps masses and positions in it, to the last bit"
        )


def _checked(position_ids: Tensor, batch: int, length: int) -> Tensor:
    places = position_ids if position_ids.dim() == 2 else position_ids[None]
    fits = places.dim() == 2 and places.shape[1] == length and places.shape[0] in (1, batch)
    if not fits or places.is_floating_point():
        raise ValueError(
            f"position_ids: expected integers [{batch}, {length}], got {position_ids.dtype} "
            f"{tuple(position_ids.shape)}"
        )
    return places.long()


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


def _common_rows(places: Tensor) -> Tensor:
    """Position ids `[B, T]` as `[1, T]` where all rows are the same."""
    if places.shape[0] == 1 or not has_values(places):
        return places
    return places[:1] if bool((places == places[:1]).all()) else places
