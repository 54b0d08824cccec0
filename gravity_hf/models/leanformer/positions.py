"""Where the tokens of a forward stand, which keys they see, and how positions enter attention."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ...layers.float32 import Float32
from ..placing import checked_position_ids, without_padding
from ..visibility import Visibility, has_values, visibility, visible_rows

# Cosines and sines `[b, T, head_dim]`; None where positions are in the hidden states.
Rotary = tuple[Tensor, Tensor] | None


class RotaryEmbedding(Float32, LlamaRotaryEmbedding):
    """transformers' cosines and sines of positions, of every `rope_type` it knows; the frequencies
    stay float32 in models of half precision."""


class Limits(NamedTuple):
    """What placing reads of a config, once: a transformers config is slow to read.

    table: the number of learned positions, or None where any number can be computed. window: keys
    that a token sees, itself among them; None: all.
    """

    table: int | None
    window: int | None


class Tokens(NamedTuple):
    """The tokens of a forward.

    places: position ids `[b, T]`, b being 1 where all rows have the same.
    mask: what hides keys beside causality: bool `[B, Tk]`, False for padding; or broadcastable to
        `[B, 1, T, Tk]`, bool (True = attend) or added to scores. None: nothing.
    slots: int64 `[T]`, where the tokens stand among the keys of a cache of fixed size. None: they
        are the last ones.
    real: bool `[B, T]`, False for padding; None: no padding.
    origin: int64 `[B|1]`, the first key of each row, where a window hides it. None: the first that
        is seen.
    """

    places: Tensor
    mask: Tensor | None
    slots: Tensor | None
    real: Tensor | None
    origin: Tensor | None


def place_tokens(
    limits: Limits,
    embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Any,
    packed: Tensor | None,
) -> Tokens:
    """Places and mask of the tokens in `embeds` `[B, T, d]`.

    Arguments as in `LeanFormerModel.forward`; `packed`: key ranges of documents packed into a row.

    Raises:
        ValueError: more positions than the model has, or arguments that do not fit.
    """
    batch, length = embeds.shape[:2]
    past, slots, keys = 0, None, length
    if cache is not None:
        past = cache.get_seq_length()
        keys = past + length
        if cache.is_compileable:
            slots = torch.arange(length, device=embeds.device) + past
            keys = cache.get_max_length(0)
    # Attention is causal by itself, whatever a mask says.
    masks = {"attention_mask": attention_mask, "slots": slots, "packed": packed}
    seen = visibility(causal=False, exclude_self=False, keys=keys, **masks)
    index = torch.arange(length, device=embeds.device)
    mask = _one_mask(seen, index, slots, keys, limits.window)
    real = _real_tokens(attention_mask, length, slots)
    if position_ids is not None:
        places = checked_position_ids(position_ids, batch, length)
    else:
        places = without_padding(attention_mask, index[None] + past, slots)
    # Tokens that are counted stand within the keys: no need to wait for a device to know it.
    if limits.table is not None and (position_ids is not None or keys > limits.table):
        _check_highest(limits.table, places)
    origin = None
    if limits.window is not None:
        padded = attention_mask is not None and attention_mask.dim() == 2
        origin = (attention_mask != 0).long().argmax(-1) if padded else index[:1]
    return Tokens(places, mask, slots, real, origin)


def _one_mask(
    seen: Visibility, index: Tensor, slots: Tensor | None, keys: int, window: int | None
) -> Tensor | None:
    length = index.shape[0]
    if window is not None and keys <= window:
        window = None
    if window is None and seen.key_ranges is None:
        mask = seen.mask
        is_padding = mask is not None and mask.shape[1:3] == (1, 1) and mask.dtype == torch.bool
        return mask[:, 0, 0] if is_padding else mask
    allowed, bias = visible_rows(seen, index, length, keys)
    if window is not None:
        place = index + (keys - length) if slots is None else slots
        allowed = allowed & (torch.arange(keys, device=index.device) > place[:, None] - window)
    if bias is None:
        return allowed
    return bias.masked_fill(~allowed, torch.finfo(bias.dtype).min)


def _real_tokens(mask: Tensor | None, length: int, slots: Tensor | None) -> Tensor | None:
    if mask is None or mask.dim() != 2:
        return None
    own = mask[:, -length:] if slots is None else mask[:, slots]
    return own != 0


def _check_highest(table: int, places: Tensor) -> None:
    if not has_values(places) or places.numel() == 0:
        return
    low, high = (int(bound) for bound in places.aminmax())
    if low < 0 or high >= table:
        raise ValueError(too_many(table, f"positions {low} to {high}"))


def too_many(table: int, got: str) -> str:
    """What to say of a text that is too long for a table of positions."""
    return (
        f"LeanFormer: expected at most {table} tokens (max_position_embeddings), as positions are "
        f"a table of so many, got {got}. Shorten the input or generate fewer tokens; "
        "position='rope' has no such end"
    )
