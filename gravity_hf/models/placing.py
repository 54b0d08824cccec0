"""Position ids and caches, as our models take them from callers."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.modeling_outputs import BaseModelOutputWithPast

from .visibility import has_values, packed_documents

# transformers 5.24 has another name for what a model's output calls `past_key_values`.
CACHE_FIELD = next(
    name for name in ("cache", "past_key_values") if name in BaseModelOutputWithPast.__annotations__
)


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
    packed = packed_documents(checked_position_ids(position_ids, batch, length), attention_mask)
    if packed is not None and cache is not None:
        raise ValueError(
            "position_ids: expected one document per row beside a cache, got positions that start "
            "again. Leave the cache out (use_cache=False), or give each document a row"
        )
    return packed


def checked_position_ids(position_ids: Tensor, batch: int, length: int) -> Tensor:
    """Position ids as int64 `[B|1, T]`; ValueError for others."""
    places = position_ids if position_ids.dim() == 2 else position_ids[None]
    fits = places.dim() == 2 and places.shape[1] == length and places.shape[0] in (1, batch)
    if not fits or places.is_floating_point():
        raise ValueError(
            f"position_ids: expected integers [{batch}, {length}], got {position_ids.dtype} "
            f"{tuple(position_ids.shape)}"
        )
    return places.long()


def without_padding(mask: Tensor | None, counted: Tensor, slots: Tensor | None) -> Tensor:
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


def common_rows(places: Tensor) -> Tensor:
    """Position ids `[B, T]` as `[1, T]` where all rows are the same."""
    if places.shape[0] == 1 or not has_values(places):
        return places
    return places[:1] if bool((places == places[:1]).all()) else places


def check_cache(cache: Any, keeps: str) -> None:
    """ValueError for a cache that rounds or drops what is put in; `keeps`: who keeps what in it, as
    in "an LGT keeps masses"."""
    kind = type(cache.layers[0]) if cache.layers else DynamicLayer
    if kind not in (DynamicLayer, StaticLayer):
        raise ValueError(
            f"past_key_values: expected a DynamicCache or StaticCache, got {type(cache).__name__} "
            f"of {kind.__name__}: {keeps} in it, to the last bit"
        )
