"""What a host's attention call asks for beside q, k, v: read once, in one place.

transformers hands such things over as keyword arguments, under the names of the models that have
them. Gravity gives each the meaning that it has for distances: what hides keys stays a mask, what
is added to a score stays a bias, and a cap or a sink is the operator's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..ops.reference import split_mask
from .masks import causal_mask, ordinary
from .support import CAUSAL_IN_NAME_ONLY, refuse_arguments


class HostTerms(NamedTuple):
    """The arguments of one attention call, as they enter the scores.

    Attributes:
        mask: None (attend everywhere), or 4-D bool or additive float, broadcastable to `[B, H, Tq,
            Tk]`; the host's own tensor wherever that says it all, so that what it remembers
            (`masks.visible_keys_of`) still holds.
        bias: added to the scores, `[1|B, 1|H, Tq, Tk]`; gradients reach it.
        softcap: in nats; see `gravity_attention`.
        sinks: `[H]` or `[B, H, Tq]`, in nats; see `gravity_attention`.
        head_mask: multiplies the weights, broadcastable to `[B, H, Tq, Tk]`.
    """

    mask: Tensor | None = None
    bias: Tensor | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    head_mask: Tensor | None = None

    @property
    def folded_mask(self) -> Tensor | None:
        """Mask and bias as one tensor that has its values."""
        return fold(ordinary(self.mask), self.bias)


def terms_of_call(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    arguments: Mapping[str, Any],
) -> HostTerms:
    """Read the keyword arguments of an attention call.

    Args:
        module: the attention module; its indexer, if it has one, says how it counts key blocks.
        query: `[B, H, Tq, D]`.
        key: `[B, Hkv, Tk, D]`.
        mask: as transformers handed it over; a 2-D one is raw padding, `[B, Tk]`, not 0 = real.
        arguments: everything else transformers passed.

    Raises:
        ValueError: an argument without a meaning for distances, or one whose shape is not known.
    """
    refuse_arguments(arguments)
    mask = _padding_as_mask(mask)
    if mask is None and _is_causal_unsaid(module, query, arguments):
        mask = causal_mask(query, key.shape[2])
    indices, blocks = arguments.get("indices"), arguments.get("block_indices")
    if blocks is not None:
        mask = _only_blocks(module, query, key, mask, blocks, arguments.get("position_ids"))
    # As many keys as there are: the indexer left none out.
    if indices is not None and indices.shape[-1] < key.shape[2]:
        mask = _only_selected(key, mask, indices)
    return HostTerms(
        mask,
        _position_bias(arguments.get("position_bias")),
        arguments.get("softcap"),
        _sinks(query, arguments),
        _head_mask(query, arguments.get("head_mask")),
    )


def fold(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """An additive mask that hides what `mask` hides and adds `bias` to the rest."""
    if bias is None or mask is None:
        return mask if bias is None else bias
    # Told apart first: the lowest value of one dtype is not that of another.
    visible, added = split_mask(mask.to(bias.device))
    total = bias if added is None else bias + added
    return torch.where(visible, total, torch.finfo(total.dtype).min)


def additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask in the form that eager attention adds: bool ones become 0 and the lowest value."""
    mask = ordinary(mask)
    if mask is None or mask.dtype != torch.bool:
        return mask
    nothing = torch.zeros((), dtype=dtype, device=mask.device)
    return torch.where(mask, nothing, torch.finfo(dtype).min)


def _padding_as_mask(mask: Tensor | None) -> Tensor | None:
    if mask is None or mask.dim() != 2:
        return mask
    return mask[None, None] if mask.is_floating_point() else (mask != 0)[:, None, None]


def _is_causal_unsaid(module: nn.Module, query: Tensor, arguments: Mapping[str, Any]) -> bool:
    """Whether a call without a mask means causal attention, as SDPA and flash attention read it.

    Most hosts ask for a mask, and get None only where nothing is hidden; some leave causality to
    `is_causal` of the call or of the module.
    """
    given = arguments.get("is_causal")
    if given is None:
        given = type(module).__name__ not in CAUSAL_IN_NAME_ONLY and getattr(
            module, "is_causal", False
        )
    return bool(given) and query.shape[2] > 1


def _only_selected(key: Tensor, mask: Tensor | None, indices: Tensor) -> Tensor:
    """`mask` without the keys that a sparse indexer left out; `indices` `[B, Tq, topk]`, entries
    below 0 select nothing."""
    batch, queries, _ = indices.shape
    # One column more takes what selects nothing.
    selected = torch.zeros(
        batch, queries, key.shape[2] + 1, dtype=torch.bool, device=indices.device
    )
    chosen = torch.where(indices < 0, key.shape[2], indices).long()
    selected = selected.scatter(-1, chosen, torch.ones_like(chosen, dtype=torch.bool))
    selected = selected[:, None, :, :-1]
    mask = ordinary(mask)
    if mask is None:
        return selected
    if mask.dtype == torch.bool:
        return mask & selected
    return mask.masked_fill(~selected, torch.finfo(mask.dtype).min)


def _only_blocks(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    blocks: Tensor,
    positions: Tensor | None,
) -> Tensor:
    """`mask` without the blocks of keys that the module's own indexer left out, by its own word."""
    queries, keys = query.shape[2], key.shape[2]
    if positions is None:
        positions = torch.arange(keys - queries, keys, device=query.device)
    positions = positions if positions.dim() > 1 else positions[None]
    indexer: Any = module.indexer
    return indexer.build_block_mask(
        blocks,
        ordinary(mask),
        keys,
        query.dtype,
        query.device,
        positions.expand(query.shape[0], -1),
    )


def _position_bias(bias: Tensor | None) -> Tensor | None:
    return bias if bias is None or bias.dim() == 4 else bias[None]


def _sinks(query: Tensor, arguments: Mapping[str, Any]) -> Tensor | None:
    """`s_aux` `[H]`, or `sinks` `[B, H, Tq, 1]`: one for each query."""
    sinks = arguments.get("s_aux")
    sinks = arguments.get("sinks") if sinks is None else sinks
    if sinks is None:
        return None
    per_head = (query.shape[1],)
    # No `in`: it does not compare the symbolic lengths of a compiled graph.
    if sinks.dim() == 1 and sinks.shape == per_head:
        return sinks
    if sinks.dim() == 4 and sinks.shape == (*query.shape[:3], 1):
        return sinks.squeeze(-1)
    raise ValueError(
        f"gravity attention: sinks: expected [H] = {list(per_head)} or [B, H, Tq, 1] = "
        f"{[*query.shape[:3], 1]}, got {tuple(sinks.shape)}. Pass one logit per head or per query"
    )


def _head_mask(query: Tensor, head_mask: Tensor | None) -> Tensor | None:
    if head_mask is None:
        return None
    per_head = head_mask[:, None, None] if head_mask.dim() == 1 else head_mask
    fits = per_head.dim() in (3, 4) and per_head.shape[-3] in (1, query.shape[1])
    if not fits:
        raise ValueError(
            f"gravity attention: head_mask: expected [H] or broadcastable to [B, H, Tq, Tk], H = "
            f"{query.shape[1]}, got {tuple(head_mask.shape)}. Pass the mask of one layer at a time"
        )
    return per_head
