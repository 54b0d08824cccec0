"""Who sees whom: masks, packed documents and fixed-size caches, as the operator takes them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.reference import SELF_SCORE, split_mask


class Visibility(NamedTuple):
    """Arguments of `gravity_attention`: `causal`; `mask`, broadcastable to `[B, H, Tq, Tk]`;
    `key_ranges` int32 `[B, Tq, 2]`; `exclude_self`."""

    causal: bool = False
    mask: Tensor | None = None
    key_ranges: Tensor | None = None
    exclude_self: bool = False


def is_traced() -> bool:
    """In a graph, which must not look at values."""
    return torch.compiler.is_compiling()


def has_values(tensor: Tensor) -> bool:
    """Whether one may look at them: not in a graph, and not where there are only shapes."""
    return not is_traced() and tensor.device.type != "meta"


def visibility(
    *,
    causal: bool,
    exclude_self: bool,
    attention_mask: Tensor | None,
    keys: int,
    slots: Tensor | None = None,
    packed: Tensor | None = None,
    cut: bool = False,
) -> Visibility:
    """What the queries of one forward see.

    Args:
        causal: a token sees what stands before it.
        exclude_self: a token does not see itself, unless it sees no other.
        attention_mask: `[B, Tk]`, 0 for padding; or `[B|1, H|1, Tq, Tk]`, bool (True = attend) or
            added to the scores, which then decides alone, causality included.
        keys: `Tk`.
        slots: int64 `[Tq]`, where the queries stand among the keys of a cache of fixed size; None:
            they are the last ones.
        packed: key ranges of documents, see `packed_documents`.
        cut: a cutoff may hide what a mask shows, so that only the operator knows who sees no other.

    Raises:
        ValueError: a mask that does not fit.
    """
    mask = _as_4d(attention_mask, keys, slots)
    decides_alone = attention_mask is not None and attention_mask.dim() == 4
    causal = causal and not decides_alone
    if slots is None:
        return Visibility(causal, mask, packed, exclude_self)
    key = torch.arange(keys, device=slots.device)
    if causal:
        written = (key <= slots[:, None])[None, None]
        mask = written if mask is None else mask & written
    if exclude_self:
        mask = (_with_own_last if cut else _without_own)(mask, key == slots[:, None])
    return Visibility(False, mask, None, False)


def packed_documents(position_ids: Tensor, attention_mask: Tensor | None) -> Tensor | None:
    """Key ranges int32 `[b, T, 2]` of documents packed into a row: one starts wherever positions do
    not go on growing. Padding starts none. None: there is one document.

    Args:
        position_ids: `[b, T]`.
        attention_mask: `[B, T]`, 0 for padding; or of four dimensions, which decides alone.
    """
    length = position_ids.shape[1]
    if attention_mask is not None and attention_mask.shape[1:] != (length,):
        return None
    index = torch.arange(length, device=position_ids.device)
    if attention_mask is None:
        index = index.expand_as(position_ids)
        starts = torch.ones_like(position_ids, dtype=torch.bool)
        starts[:, 1:] = position_ids[:, 1:] <= position_ids[:, :-1]
    else:
        seen = attention_mask != 0
        index, position_ids = index.expand_as(seen), position_ids.expand_as(seen)
        # Of each token, the last one before it that is no padding.
        latest = torch.where(seen, index, 0).cummax(-1).values[:, :-1]
        starts = torch.ones_like(seen)
        again = position_ids[:, 1:] <= position_ids.gather(1, latest)
        starts[:, 1:] = again & seen[:, 1:] & seen.gather(1, latest)
    if has_values(starts) and not bool(starts[:, 1:].any()):
        return None
    start = torch.where(starts, index, 0).cummax(-1).values
    # The next start to the right, found from the end.
    ends = torch.where(starts, index, length).flip(-1).cummin(-1).values.flip(-1)
    last = torch.full_like(ends[:, :1], length)
    stop = torch.cat([ends[:, 1:], last], -1)
    return torch.stack([start, stop], -1).to(torch.int32)


def _as_4d(mask: Tensor | None, keys: int, slots: Tensor | None) -> Tensor | None:
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() not in (2, 4):
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise ValueError(
            f"attention_mask: expected [B, {keys}], or [B, 1, Tq, {keys}], got {got}. Give one "
            "entry per token, 0 for padding"
        )
    missing = keys - mask.shape[-1]
    if missing < 0 or (missing and (mask.dim() == 4 or not _reaches(mask, slots))):
        raise ValueError(
            f"attention_mask: expected {keys} keys in its last dimension, got {mask.shape[-1]}. "
            "With a cache it covers the cached tokens, too"
        )
    if mask.dim() == 4:
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(
                "attention_mask: expected bool (True = attend) or floats that are added to the "
                f"scores, in four dimensions, got {mask.dtype}. Give mask.bool()"
            )
        return mask
    mask = torch.nn.functional.pad(mask != 0, (0, missing))
    if has_values(mask) and bool(mask.all()):
        return None
    return mask[:, None, None]


def _reaches(mask: Tensor, slots: Tensor | None) -> bool:
    """Of a cache with a fixed size, a mask `[B, n]` may cover the filled part only."""
    if slots is None:
        return False
    return not has_values(slots) or mask.shape[1] > int(slots[-1])


def _without_own(mask: Tensor | None, own: Tensor) -> Tensor:
    """`mask` less the pairs `own` `[Tq, Tk]` of queries that see another key."""
    if mask is None:
        return ~own[None, None]
    if mask.dtype != torch.bool:
        raise ValueError(
            f"attention_mask: expected bool beside exclude_self and a cache of fixed size, got "
            f"{mask.dtype}. Give True where a token may attend"
        )
    others = mask & ~own
    return others | (mask & own & ~others.any(-1, keepdim=True))


def visible_rows(
    seen: Visibility, rows: Tensor, queries: int, keys: int, hidden: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Which keys the query rows with these indices, int64 `[R]`, see: bool, and what a float mask
    adds to their scores; both broadcastable to `[B, H, R, Tk]`, as is `hidden`: what something else
    hides from them."""
    key = torch.arange(keys, device=rows.device)
    # Where the queries stand among the keys, `[R, 1]`: the ends of both meet.
    place = (rows + (keys - queries)).unsqueeze(-1)
    allowed, bias = torch.ones_like(place, dtype=torch.bool)[None, None], None
    if seen.causal:
        allowed = allowed & (key <= place)
    if seen.key_ranges is not None:
        ranges = seen.key_ranges
        ranges = ranges if ranges.shape[1] == 1 else ranges[:, rows]
        start, stop = ranges[:, None].unsqueeze(-2).unbind(-1)
        allowed = allowed & (key >= start) & (key < stop)
    if seen.mask is not None:
        mask, bias = split_mask(seen.mask)
        mask, bias = (_rows_of(x, rows) for x in (mask, bias))
        bias = None if bias is None else bias.masked_fill(~mask, 0.0)
        allowed = allowed & mask
    if hidden is not None:
        allowed = allowed & ~hidden
    if seen.exclude_self:
        own = key == place
        others = allowed & ~own
        allowed = others | (allowed & own & ~others.any(-1, keepdim=True))
    return allowed, bias


def _rows_of(mask: Tensor | None, rows: Tensor) -> Tensor | None:
    if mask is None:
        return None
    mask = mask[(None,) * (4 - mask.dim())]
    return mask if mask.shape[2] == 1 else mask[:, :, rows]


def _with_own_last(mask: Tensor | None, own: Tensor) -> Tensor:
    """`mask`, as added to scores, with the pairs `own` `[Tq, Tk]` far below all that can be seen:
    they weigh nothing, unless nothing else is left."""
    last = torch.zeros(own.shape, device=own.device).masked_fill(own, SELF_SCORE)[None, None]
    if mask is None:
        return last
    attend, bias = split_mask(mask)
    added = last if bias is None else last + bias
    return added.masked_fill(~attend, torch.finfo(last.dtype).min)
