"""The functions that transformers calls under the name `"gravity"`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..config import GravityConfig
from ..layers.observing import RowSample
from ..layers.parameters import GravityTerms
from ..ops.api import gravity_attention
from ..ops.reference import (
    compute_dtype,
    gravity_attention_reference,
    gravity_score,
    neutral_distance,
    soft_capped,
    split_mask,
    squared_distance,
)
from .arguments import HostTerms, fold, terms_of_call
from .guards import refuse_lost_masses
from .host_attention import dot_product_attention, weighted_values
from .implementations import ATTENTION_NAME as ATTENTION_NAME
from .masks import gravity_mask, ordinary, visible_keys_of


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
        mask: as transformers handed it over; `host_terms.mask` is what it means.
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
        return _terms_of(self.module, self.query, self.key)

    @property
    def config(self) -> GravityConfig:
        """Settings of this module's gravity."""
        return self.module.gravity.config  # type: ignore[union-attr,return-value]

    @cached_property
    def host_terms(self) -> HostTerms:
        """Mask, bias, cap and sinks that the host's call asks for, read once."""
        return terms_of_call(self.module, self.query, self.key, self.mask, self.arguments)

    def detached(self) -> AttentionCall:
        """The same call, through which no gradient reaches the host."""
        arguments = {
            name: value.detach() if isinstance(value, Tensor) else value
            for name, value in self.arguments.items()
        }
        query, key, value = (x.detach() for x in (self.query, self.key, self.value))
        return replace(self, query=query, key=key, value=value, arguments=arguments)

    def gravity(self) -> tuple[Tensor, Tensor | None]:
        """`[B, Tq, H, Dv]` contiguous; the weights where `output_attentions` asks, else None."""
        return _gravity(
            self.config,
            self.terms,
            self.query,
            self.key,
            self.value,
            self.host_terms,
            self.dropout,
            self.arguments,
        )

    def dot_product(self) -> tuple[Tensor, Tensor | None]:
        """The host's attention on the same tensors, in the form of `gravity()`."""
        return dot_product_attention(
            self.module,
            self.query,
            self.key,
            self.value,
            self.host_terms,
            self.dropout,
            self.scaling,
            self.arguments,
        )

    def gravity_scores(self) -> Tensor:
        """`[B, H, Tq, Tk]` before softmax, at least float32; hidden keys at the lowest value. One
        more column where the host has sinks: the sink's score."""
        return self._forces_and_scores(None)[1]

    def rows(self, rows: Tensor) -> RowSample:
        """Those query rows, int64 `[R]`, as `layers.observing` defines them; the scores are the
        rows of `gravity_scores`."""
        with torch.no_grad():
            force, score = self._forces_and_scores(rows)
            mask = self._mask_of(rows)
            if mask is None:
                visible = torch.ones_like(force[:1, :1], dtype=torch.bool)
            else:
                visible = split_mask(mask)[0].expand(-1, -1, *force.shape[-2:])
            return RowSample(force, score, visible)

    @property
    def max_force(self) -> float | None:
        """None: the law of converted hosts has no cap on forces."""
        return None

    @property
    def force_cap(self) -> str:
        """How `max_force` would cap."""
        return "clamp"

    def query_count(self) -> int:
        """`Tq`."""
        return self.query.shape[2]

    def masses(self) -> Tensor:
        """`[H]`, float32."""
        return self.terms.mass.detach()

    def _forces_and_scores(self, rows: Tensor | None) -> tuple[Tensor, Tensor]:
        """Of the query rows `rows`, or all: `RowSample.force`, and `gravity_scores`."""
        query, key = self._upcast()
        query = query if rows is None else query[:, :, rows]
        terms, radius_sq = self.terms, self.terms.key_radius_sq
        if radius_sq is not None:
            radius_sq = radius_sq.to(query.dtype).repeat_interleave(self._groups)
        mass, softening = terms.mass.to(query.dtype), terms.softening.to(query.dtype)

        def law(distance_sq: Tensor) -> Tensor:
            return gravity_score(distance_sq, mass, softening, self.config.law)

        score = law(squared_distance(query, key, radius_sq))
        force = score.exp() if self.config.law == "power" and rows is not None else score
        softcap = self.host_terms.softcap
        if softcap is not None:
            score = soft_capped(score, law(neutral_distance(query, key, radius_sq)), softcap)
        origin = torch.zeros_like(key[:, :, :1])
        at_origin = law(squared_distance(query, origin, radius_sq))
        return force, self._completed(score, at_origin, rows)

    def dot_product_scores(self) -> Tensor:
        """As `gravity_scores`, of the host: `scaling * q.k`, capped."""
        query, key = self._upcast()
        scaling = self.scaling if self.scaling else query.shape[-1] ** -0.5
        score = scaling * (query @ key.transpose(-2, -1))
        softcap = self.host_terms.softcap
        if softcap is not None:
            score = softcap * torch.tanh(score / softcap)
        return self._completed(score, torch.zeros_like(score[..., :1]))

    @property
    def _groups(self) -> int:
        return self.query.shape[1] // self.key.shape[1]

    def _upcast(self) -> tuple[Tensor, Tensor]:
        dtype = compute_dtype(self.query.dtype)
        return self.query.to(dtype), self.key.to(dtype).repeat_interleave(self._groups, 1)

    def _mask_of(self, rows: Tensor | None) -> Tensor | None:
        """Mask and bias of the query rows `rows`, or of all, as one tensor."""
        mask = self.host_terms.folded_mask
        if mask is None or rows is None or mask.shape[-2] == 1:
            return mask
        return mask[..., rows.to(mask.device), :]

    def _completed(self, score: Tensor, at_origin: Tensor, rows: Tensor | None = None) -> Tensor:
        """Scores under mask and bias; `at_origin` `[B, H, Tq, 1]` is what a sink adds to."""
        mask, sinks = self._mask_of(rows), self.host_terms.sinks
        if mask is not None:
            visible, bias = split_mask(mask)
            if bias is not None:
                score = score + bias.masked_fill(~visible, 0.0).to(score.dtype)
            score = score.masked_fill(~visible, torch.finfo(score.dtype).min)
        if sinks is None:
            return score
        if sinks.dim() == 1:
            sinks = sinks[:, None]
        elif rows is not None:
            sinks = sinks[..., rows.to(sinks.device)]
        return torch.cat([score, at_origin + sinks.to(score.dtype).unsqueeze(-1)], -1)


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
    query, key, value = _of_one_batch(query, key, value)
    host = terms_of_call(module, query, key, attention_mask, kwargs)
    if gravity is None:
        refuse_lost_masses(module)
        return dot_product_attention(module, query, key, value, host, dropout, scaling, kwargs)
    if gravity.observer is not None:
        return gravity.observer.attend(
            AttentionCall(module, query, key, value, attention_mask, dropout, scaling, kwargs)
        )
    terms = _terms_of(module, query, key)
    return _gravity(gravity.config, terms, query, key, value, host, dropout, kwargs)


def _of_one_batch(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same where batches agree; else broadcast, as eager attention does: learned queries `[1,
    H, Tq, D]` that attend to the keys of every window."""
    batch, keys = query.shape[0], key.shape[0]
    if batch == keys or 1 not in (batch, keys):
        return query, key, value
    first, second, third = (
        x if x.shape[0] > 1 else x.expand(max(batch, keys), -1, -1, -1) for x in (query, key, value)
    )
    return first, second, third


def _terms_of(module: nn.Module, query: Tensor, key: Tensor) -> GravityTerms:
    """The terms in force; ValueError if they were made for other heads than this call has."""
    gravity: Any = module.gravity
    terms: GravityTerms = gravity()
    masses, heads, kv_heads = terms.mass.shape[0], query.shape[1], key.shape[1]
    # By their ratio: under tensor parallelism a process has its share of both.
    fits = masses == heads and heads * gravity.key_value_heads == kv_heads * gravity.query_heads
    if not fits:
        raise ValueError(
            f"{type(module).__name__}: expected {masses} query heads, {gravity.query_heads} over "
            f"{gravity.key_value_heads} key-value heads, got {heads} over {kv_heads}: its head "
            "counts were not where gravity_hf looks for them. Leave the module out with "
            "GravityConfig(layers=[...])"
        )
    return terms


def _gravity(
    config: GravityConfig,
    terms: GravityTerms,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    host: HostTerms,
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
    if host.softcap is not None:
        options["softcap"] = host.softcap
    if host.sinks is not None:
        options["sinks"] = host.sinks
    if arguments.get("output_attentions") or host.head_mask is not None:
        result = gravity_attention_reference(
            query, key, value, terms.mass, eps=terms.softening, mask=host.folded_mask, **options
        )
        output, weights = result.output.transpose(1, 2).contiguous(), result.weights
        if host.head_mask is not None:
            weights = weights * host.head_mask
            output = weighted_values(weights, value)
        asked = weights.to(query.dtype) if arguments.get("output_attentions") else None
        return output.to(out_dtype), asked
    output = gravity_attention(
        query,
        key,
        value,
        terms.mass,
        eps=terms.softening,
        impl=config.implementation,
        **_visibility(host, query, key),
        **options,
    )
    return output.transpose(1, 2).to(out_dtype).contiguous(), None


def _visibility(host: HostTerms, query: Tensor, key: Tensor) -> dict[str, Any]:
    """Which keys are seen, as arguments of `gravity_attention`: the mask's own word for it where it
    was made for tensors of these shapes on this device, else its values."""
    mask, bias = host.mask, None if host.bias is None else host.bias.to(query.device)
    visible = visible_keys_of(mask)
    if mask is None or visible is None or mask.device != query.device:
        values = ordinary(mask)
        return {"mask": fold(None if values is None else values.to(query.device), bias)}
    batch, _, queries, keys = mask.shape
    if (queries, keys) != (query.shape[2], key.shape[2]) or batch not in (1, query.shape[0]):
        return {"mask": fold(ordinary(mask), bias)}
    return {
        "mask": fold(visible.mask, bias),
        "causal": visible.causal,
        "window": visible.window,
        "key_ranges": visible.key_ranges,
    }


def register() -> None:
    """Register attention and mask under one name: without the mask function transformers would hand
    over None for every batch, padded and causal ones included.
    """
    AttentionInterface.register(ATTENTION_NAME, gravity_attention_forward)
    AttentionMaskInterface.register(ATTENTION_NAME, gravity_mask)
