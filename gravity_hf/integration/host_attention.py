"""The host's own attention, on the tensors that gravity was called with."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .arguments import HostTerms, additive
from .sites import memoised

Attention = Callable[..., tuple[Tensor, Tensor | None]]


def dot_product_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: HostTerms,
    dropout: float,
    scaling: float | None,
    arguments: Mapping[str, Any],
) -> tuple[Tensor, Tensor | None]:
    """What the host would have computed: `[B, Tq, H, Dv]`, and its weights where asked for.

    By SDPA where it can; where there is a cap, a sink or a bias, or the weights are wanted, by the
    eager function of the module's own file, with all its peculiarities.

    Raises:
        ValueError: such a call on a module whose file has no eager attention.
    """
    more = (terms.bias, terms.softcap, terms.sinks, terms.head_mask)
    if any(term is not None for term in more) or arguments.get("output_attentions"):
        return _eager(module, query, key, value, terms, dropout, scaling, arguments)
    # `terms_of_call` leaves no mask only where everything is attended: SDPA must not guess.
    causality = {"is_causal": False} if terms.mask is None else {}
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        terms.mask,
        dropout=dropout,
        scaling=scaling,
        **{**arguments, **causality},
    )


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: HostTerms,
    dropout: float,
    scaling: float | None,
    arguments: Mapping[str, Any],
) -> tuple[Tensor, Tensor | None]:
    attention = eager_attention_of(type(module))
    if attention is None:
        asked = sorted(name for name, value in arguments.items() if value is not None)
        raise ValueError(
            f"{type(module).__name__}: expected an eager_attention_forward in "
            f"{type(module).__module__} for the arguments {asked}, which SDPA cannot honour, found "
            "none. Convert the module (GravityConfig(layers=None)), or use another host"
        )
    output, weights = attention(
        module,
        query,
        key,
        value,
        additive(terms.mask, query.dtype),
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        dropout=dropout,
        **arguments,
    )
    if terms.head_mask is not None and weights is not None:
        weights = weights * terms.head_mask
        output = weighted_values(weights, value)
    return output, weights


@memoised
def eager_attention_of(module_class: type) -> Attention | None:
    """The eager attention that a class of attention modules falls back to; None if its file has
    none. Subclasses made elsewhere have their base's."""
    for cls in module_class.__mro__:
        names = vars(sys.modules.get(cls.__module__, object))
        found = [name for name in names if name.endswith("eager_attention_forward")]
        if cls is not nn.Module and found:
            exact = "eager_attention_forward"
            return names[exact if exact in found else found[0]]
    return None


def weighted_values(weights: Tensor, value: Tensor) -> Tensor:
    """`[B, Tq, H, Dv]` contiguous, in the dtype of `value` `[B, Hkv, Tk, Dv]`."""
    value = value.repeat_interleave(weights.shape[1] // value.shape[1], 1)
    product = torch.matmul(weights, value.to(weights.dtype))
    return product.transpose(1, 2).contiguous().to(value.dtype)
