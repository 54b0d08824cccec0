"""The functions that transformers calls under the name `"gravity"`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

from ..ops.api import gravity_attention
from ..ops.reference import gravity_attention_reference
from .support import refuse_arguments

ATTENTION_NAME = "gravity"


def gravity_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention signature over `gravity_attention`.

    A module without a `gravity` child keeps dot-product attention: that is how `layers=` works.

    Args:
        module: the attention module; its child `gravity` is called for masses and softenings.
        query: `[B, H, Tq, D]`, after rotary embedding.
        key: `[B, Hkv, Tk, D]`.
        value: `[B, Hkv, Tk, Dv]`.
        attention_mask: None (attend everywhere), or 4-D bool or additive float.
        scaling: the host's own; distances have no use for it, calibration does.

    Returns:
        `[B, Tq, H, Dv]` contiguous; the weights `[B, H, Tq, Tk]` where `output_attentions` asks.
    """
    gravity = getattr(module, "gravity", None)
    if gravity is None:
        return _dot_product(module, query, key, value, attention_mask, dropout, scaling, kwargs)
    refuse_arguments(kwargs)
    if gravity.observer is not None:
        gravity.observer.see(query, key, attention_mask, scaling)
        return _dot_product(module, query, key, value, attention_mask, dropout, scaling, kwargs)

    terms, config = gravity(), gravity.config
    options = {
        "law": config.law,
        "key_radius_sq": terms.key_radius_sq,
        "mask": attention_mask,
        "dropout_p": dropout,
    }
    weights = None
    if kwargs.get("output_attentions"):
        result = gravity_attention_reference(
            query, key, value, terms.mass, eps=terms.softening, **options
        )
        output, weights = result.output, result.weights.to(query.dtype)
    else:
        output = gravity_attention(
            query,
            key,
            value,
            terms.mass,
            eps=terms.softening,
            impl=config.implementation,
            **options,
        )
    return output.transpose(1, 2).contiguous(), weights


def _dot_product(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor | None]:
    # Our mask function leaves no mask only where everything is attended: SDPA must not guess.
    causality = {"is_causal": False} if attention_mask is None else {}
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        **{**kwargs, **causality},
    )


def register() -> None:
    """Register attention and mask under one name: without the mask function transformers would hand
    over None for every batch, padded and causal ones included.

    The additive mask is the one kind that also serves modules which never reach our function but
    share a config with one that does: they add it as they always did.
    """
    AttentionInterface.register(ATTENTION_NAME, gravity_attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, eager_mask)
