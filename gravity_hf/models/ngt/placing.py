"""Which positions the tokens of a forward take, and which keys they see."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..placing import check_cache, checked_position_ids, without_padding
from ..visibility import Visibility, has_values, visibility
from .configuration_ngt import NGTConfig


class Limits(NamedTuple):
    """What placing reads of a config, once: a transformers config is slow to read.

    table: the number of learned positions, or None where any number can be computed. crop: in
    evaluation, inputs keep their last so many tokens; None: all. exclude_self: as in the config.
    cut: whether a cutoff hides keys.
    """

    table: int | None
    crop: int | None
    exclude_self: bool
    cut: bool

    @classmethod
    def of(cls, config: NGTConfig) -> Limits:
        longest = config.max_position_embeddings
        return cls(
            longest if config.has_position_table else None,
            longest if config.crop_long_inputs else None,
            config.exclude_self and not config.is_twin,
            config.cutoff == "hard",
        )


class Inputs(NamedTuple):
    """What a forward is given of these names."""

    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    attention_mask: Tensor | None
    position_ids: Tensor | None


class Tokens(NamedTuple):
    """places: position ids `[b, T]`, b being 1 where all rows have the same."""

    places: Tensor
    visible: Visibility


def cropped(inputs: Inputs, longest: int) -> Inputs:
    """The last `longest` tokens of all; positions start again at 0."""
    mask, places = inputs.attention_mask, inputs.position_ids
    if mask is not None:
        mask = mask[..., -longest:]
        mask = mask[..., -longest:, :] if mask.dim() == 4 else mask
    if places is not None:
        places = places[..., -longest:]
        # Of a document that starts later nothing was cut off.
        grows = torch.ones_like(places, dtype=torch.bool)
        grows[..., 1:] = places[..., 1:] > places[..., :-1]
        first = grows.long().cumprod(-1)
        places = places - places[..., :1] * first
    ids, embeds = inputs.input_ids, inputs.inputs_embeds
    ids = None if ids is None else ids[:, -longest:]
    return Inputs(ids, None if embeds is None else embeds[:, -longest:], mask, places)


def place_tokens(
    limits: Limits,
    embeds: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: Any,
    packed: Tensor | None,
) -> Tokens:
    """Places and visibility of the tokens in `embeds` `[B, T, D]`.

    Arguments as in `NGTModel.forward`; `packed`: key ranges of documents packed into a row.

    Raises:
        ValueError: more positions than the model has, or arguments that do not fit.
    """
    batch, length = embeds.shape[:2]
    past, slots, keys = 0, None, length
    if cache is not None:
        check_cache(cache, "an NGT keeps coordinates and masses")
        past = cache.get_seq_length()
        if cache.is_compileable:
            slots = torch.arange(length, device=embeds.device) + past
            keys = cache.get_max_length(0)
        else:
            keys = past + length
    visible = visibility(
        causal=True,
        exclude_self=limits.exclude_self,
        attention_mask=attention_mask,
        keys=keys,
        slots=slots,
        packed=packed,
        cut=limits.cut,
    )
    if position_ids is not None:
        places = checked_position_ids(position_ids, batch, length)
        _check_highest(limits, places)
        return Tokens(places, visible)
    counted = torch.arange(length, device=embeds.device)[None] + past
    places = without_padding(attention_mask, counted, slots)
    if slots is not None or places is not counted:
        _check_highest(limits, places)
    elif limits.table is not None and past + length > limits.table:
        raise ValueError(too_many(limits.table, f"{past + length} tokens"))
    return Tokens(places, visible)


def _check_highest(limits: Limits, places: Tensor) -> None:
    if limits.table is None or not has_values(places) or places.numel() == 0:
        return
    low, high = (int(bound) for bound in places.aminmax())
    if low < 0 or high >= limits.table:
        raise ValueError(too_many(limits.table, f"positions {low} to {high}"))


def too_many(table: int, got: str) -> str:
    return (
        f"NGT: expected at most {table} tokens (max_position_embeddings), as positions are a table "
        f"of so many, got {got}. Shorten the input, generate fewer tokens, or set "
        "config.crop_long_inputs, which drops the beginning in evaluation"
    )
