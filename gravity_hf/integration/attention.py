"""The functions that transformers calls under the name `"gravity"`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..config import GravityConfig
from ..layers.parameters import GravityTerms
from ..ops.api import gravity_attention
from ..ops.reference import (
    compute_dtype,
    gravity_attention_reference,
    gravity_score,
    split_mask,
    squared_distance,
)
from .masks import gravity_mask, ordinary, visible_keys_of
from .support import refuse_arguments

ATTENTION_NAME = "gravity"


@dataclass(frozen=True, eq=False)
class AttentionCall:
    """One call of a converted attention module, with both laws at hand.

    Made only for an observer, which decides what the module goes on with.
    `dataclasses.replace(call, dropout=0.0)` gives the same call under other conditions.

    Attributes:
        module: the attention module; its child `gravity` holds masses and softenings.
        query: `[B, H, Tq, D]`, after rotary embedding.
        key: `[B, Hkv, Tk, D]`.
        value: `[B, Hkv, Tk, Dv]`.
        mask: None (attend everywhere), or 4-D bool or additive float; see `masks.gravity_mask`.
        dropout: probability, 0 outside training.
        scaling: the host's own; None means `D ** -0.5`.
        arguments: what else transformers passed.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    dropout: float
    scaling: float | None
    arguments: Mapping[str, Any]

    @cached_property
    def terms(self) -> GravityTerms:
        """Masses, softenings and key radii in force, computed once."""
        return self.module.gravity()  # type: ignore[operator]

    @property
    def config(self) -> GravityConfig:
        """Settings of this module's gravity."""
        return self.module.gravity.config  # type: ignore[union-attr,return-value]

    def gravity(self) -> tuple[Tensor, Tensor | None]:
        """`[B, Tq, H, Dv]` contiguous; the weights where `output_attentions` asks, else None."""
        return _gravity(
            self.config,
            self.terms,
            self.query,
            self.key,
            self.value,
            self.mask,
            self.dropout,
            self.arguments,
        )

    def dot_product(self) -> tuple[Tensor, Tensor | None]:
        """The host's attention on the same tensors, in the form of `gravity()`."""
        return _dot_product(
            self.module,
            self.query,
            self.key,
            self.value,
            self.mask,
            self.dropout,
            self.scaling,
            self.arguments,
        )

    def gravity_scores(self) -> Tensor:
        """`[B, H, Tq, Tk]` before softmax, at least float32; hidden keys at the lowest value."""
        query, key = self._upcast()
        terms, radius_sq = self.terms, self.terms.key_radius_sq
        if radius_sq is not None:
            radius_sq = radius_sq.to(query.dtype).repeat_interleave(self._groups)
        distance_sq = squared_distance(query, key, radius_sq)
        mass, softening = terms.mass.to(query.dtype), terms.softening.to(query.dtype)
        return self._masked(gravity_score(distance_sq, mass, softening, self.config.law))

    def dot_product_scores(self) -> Tensor:
        """As `gravity_scores`, of the host: `scaling * q.k`."""
        query, key = self._upcast()
        scaling = self.scaling if self.scaling else query.shape[-1] ** -0.5
        return self._masked(scaling * (query @ key.transpose(-2, -1)))

    @property
    def _groups(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    def _upcast(self) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(self.query.dtype)
        return self.query.to(dtype), self.key.to(dtype).repeat_interleave(self._groups, 1)

    def _masked(self, score: Tensor) -> Tensor:
        if self.mask is None:
            return score
        visible, bias = split_mask(self.mask)
        if bias is not None:
            score = score + bias.masked_fill(~visible, 0.0).to(score.dtype)
        return score.masked_fill(~visible, torch.finfo(score.dtype).min)


class AttentionObserver(Protocol):
    """What may be set as `GravityParameters.observer`."""

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        """What the attention module goes on with: `call.gravity()`, `call.dot_product()` or any
        tensors of their form."""


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
        return gravity.observer.attend(
            AttentionCall(module, query, key, value, attention_mask, dropout, scaling, kwargs)
        )
    return _gravity(gravity.config, gravity(), query, key, value, attention_mask, dropout, kwargs)


def _gravity(
    config: GravityConfig,
    terms: GravityTerms,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    arguments: Mapping[str, Any],
) -> tuple[Tensor, Tensor | None]:
    out_dtype = value.dtype
    # Under autocast rotary embedding leaves q and k in float32 and the projection v in half
    # precision; distances keep the finer one.
    common = torch.promote_types(torch.promote_types(query.dtype, key.dtype), out_dtype)
    query, key, value = query.to(common), key.to(common), value.to(common)
    options: dict[str, Any] = {
        "law": config.law,
        "key_radius_sq": terms.key_radius_sq,
        "dropout_p": dropout,
    }
    weights = None
    if arguments.get("output_attentions"):
        result = gravity_attention_reference(
            query, key, value, terms.mass, eps=terms.softening, mask=ordinary(mask), **options
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
            **_visibility(mask, query, key),
            **options,
        )
    return output.transpose(1, 2).to(out_dtype).contiguous(), weights


def _visibility(mask: Tensor | None, query: Tensor, key: Tensor) -> dict[str, Any]:
    """Which keys are seen, as arguments of `gravity_attention`: the mask's own word for it where it
    was made for tensors of these shapes on this device, else its values."""
    visible = visible_keys_of(mask)
    if mask is None or visible is None or mask.device != query.device:
        values = ordinary(mask)
        return {"mask": None if values is None else values.to(query.device)}
    batch, _, queries, keys = mask.shape
    if (queries, keys) != (query.shape[2], key.shape[2]) or batch not in (1, query.shape[0]):
        return {"mask": ordinary(mask)}
    return {
        "mask": visible.mask,
        "causal": visible.causal,
        "window": visible.window,
        "key_ranges": visible.key_ranges,
    }


def _dot_product(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    kwargs: Mapping[str, Any],
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
    """
    AttentionInterface.register(ATTENTION_NAME, gravity_attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, gravity_mask)
