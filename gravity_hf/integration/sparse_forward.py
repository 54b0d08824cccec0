"""The functions that transformers calls under the names "sparse_topk" and "sparse_gravity".

Both keep what the host means: dense calls go to the attention that the host had, and what is hidden
stays hidden. What they change is how many of the visible keys a query looks at: `KeyBudget` says
how many, `layers.screening` or the keys themselves say which.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ..ops.reference import split_mask
from ..ops.sparse import DotProduct, Gravity, sparse_attention
from .arguments import HostTerms, terms_of_call
from .attention import gravity_attention_forward
from .host_attention import dot_product_attention
from .masks import gravity_mask, ordinary, visible_keys_of
from .sparse_settings import (
    SPARSE_GRAVITY_NAME,
    SPARSE_NAME,
    SparseSettings,
    attends_locally,
    settings_of_module,
)

Score = DotProduct | Gravity
Attended = tuple[Tensor, Tensor | None]
# Attribute of the key tensors that a `ScreenedCache` returns: what it keeps beside them.
KEPT = "_kept_screening"
_OBSERVER = "_sparse_observer"


class KeptScreening(NamedTuple):
    """What a cache keeps beside keys `[B, G, Tk, dh]`.

    `keys` `[B, G, Tk, ds]`: screening keys, or None where the keys themselves are; `means`
    `[B, G, blocks, ds]`: of blocks of `block_size` of them, counted from key 0.
    """

    keys: Tensor | None
    means: Tensor
    block_size: int


class SparseCall(NamedTuple):
    """One call of an attention module, as an observer sees it.

    `query` `[B, H, Tq, dh]`, `key` `[B, G, Tk, dh]`, of one dtype; `mask` as `sparse_attention`
    takes it: None (causal), key padding `[B, Tk]`, or `[B|1, 1, Tq, Tk]`.
    """

    module: nn.Module
    query: Tensor
    key: Tensor
    score: Score
    mask: Tensor | None
    settings: SparseSettings


class SparseObserver(Protocol):
    """What may watch an attention module, which goes on with its dense attention meanwhile."""

    def see(self, call: SparseCall) -> None: ...


def observe(module: nn.Module, observer: SparseObserver | None) -> None:
    """Let `observer` watch a sparse attention module; None ends it."""
    module.__dict__.pop(_OBSERVER, None)
    if observer is not None:
        module.__dict__[_OBSERVER] = observer


def sparse_topk_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> Attended:
    """transformers' attention signature over `sparse_attention` with dot products.

    Args:
        module: the attention module; `sparse_settings` on it, or `sparse_attention` in its config,
            says how keys are chosen; `attention_policy` "dense" suspends it.
        query: `[B, H, Tq, dh]`, after rotary embedding.
        key: `[B, G, Tk, dh]`.
        value: `[B, G, Tk, dv]`.
        attention_mask: as the mask function registered under this name makes it, or the caller's
            own 4-D one.
        scaling: the host's own; None means `dh ** -0.5`.

    Returns:
        `[B, Tq, H, dv]` contiguous, and None: no weights are kept.

    Raises:
        ValueError: attention that is not causal, or a term that only dense attention knows.
    """

    def dense(terms: HostTerms) -> Attended:
        return _dense(module, query, key, value, terms, dropout, scaling, kwargs)

    score = DotProduct(query.shape[-1] ** -0.5 if scaling is None else float(scaling))
    return _attend(module, query, key, value, attention_mask, dropout, kwargs, score, dense)


def sparse_gravity_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> Attended:
    """As `sparse_topk_forward`, with the law of a patched module; those without a child `gravity`
    attend by dot products."""
    gravity = getattr(module, "gravity", None)
    if gravity is None:
        return sparse_topk_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )

    def dense(terms: HostTerms | None = None) -> Attended:
        return gravity_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **kwargs
        )

    if gravity.observer is not None:
        return dense()
    terms = gravity()
    score = Gravity(terms.mass, terms.softening, gravity.config.law, terms.key_radius_sq)
    return _attend(module, query, key, value, attention_mask, dropout, kwargs, score, dense)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    dropout: float,
    arguments: Mapping[str, Any],
    score: Score,
    dense: Callable[[HostTerms], Attended],
) -> Attended:
    terms = terms_of_call(module, query, key, mask, arguments)
    policy = getattr(module, "attention_policy", "sparse")
    if policy == "dense" or attends_locally(module):
        return dense(terms)
    settings = settings_of_module(module)
    _refuse_terms(module, query, terms, arguments)
    observer = module.__dict__.get(_OBSERVER)
    if observer is None and settings.budget.covers(key.shape[2]):
        return dense(terms)
    out_dtype, kept = value.dtype, getattr(key, KEPT, None)
    common = torch.promote_types(torch.promote_types(query.dtype, key.dtype), out_dtype)
    query, key, value = query.to(common), key.to(common), value.to(common)
    seen = _visibility(terms.mask, query, key)
    if observer is not None:
        observer.see(SparseCall(module, query, key, score, seen, settings))
        return dense(terms)
    screen, means = _screen(module, settings, query, key, kept)
    output = sparse_attention(
        query,
        key,
        value,
        score=score,
        budget=settings.budget,
        screen=screen,
        # Blocks of a padded row are counted from its first token, which the cache does not know.
        means=means if seen is None else None,
        mask=seen,
        dropout_p=dropout,
    )
    return output.transpose(1, 2).to(out_dtype).contiguous(), None


def _screen(
    module: nn.Module,
    settings: SparseSettings,
    query: Tensor,
    key: Tensor,
    kept: KeptScreening | None,
) -> tuple[tuple[Tensor, Tensor] | None, Tensor | None]:
    """Screening queries and keys, None: queries and keys themselves; and kept means of blocks."""
    if kept is not None and kept.block_size != settings.budget.block_size:
        kept = None
    means = None if kept is None else kept.means
    if not settings.has_projections:
        return None, means
    screening = getattr(module, "screening", None)
    if screening is None:
        raise ValueError(
            f"{type(module).__name__}: expected a child `screening`, as screening="
            f"{settings.screening!r} has it, found none. Call sparsify_attention(model) after "
            "loading, which reads it from the checkpoint"
        )
    if kept is None or kept.keys is None:
        return screening(query, key), means
    # Of the newest key alone: those of all others are kept.
    return (screening(query, key[:, :, -1:])[0], kept.keys.to(query.dtype)), means


def _visibility(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """What a mask says, as `sparse_attention` takes it, without `[Tq, Tk]` values where it can be
    said in fewer: None (causal), `[B, Tk]`, or `[B|1, 1, Tq, Tk]`."""
    if mask is None:
        return None
    noted = visible_keys_of(mask)
    queries, keys = query.shape[2], key.shape[2]
    fits = tuple(mask.shape[-2:]) == (queries, keys)
    if noted is None or not fits or mask.device != query.device:
        return ordinary(mask).to(query.device)  # type: ignore[union-attr]
    ranges, holes = noted.key_ranges, noted.mask
    per_row = (ranges is None or ranges.shape[-2] == 1) and (holes is None or holes.shape[-2] == 1)
    if noted.window is not None or not per_row or not (noted.causal or queries == 1):
        return split_mask(ordinary(mask))[0]  # type: ignore[arg-type]
    seen = None if holes is None else holes[:, 0, 0]
    if ranges is not None:
        index = torch.arange(keys, device=ranges.device)
        inside = (index >= ranges[..., :1]) & (index < ranges[..., 1:])
        seen = inside[:, 0] if seen is None else seen & inside[:, 0]
    return None if seen is None else seen.expand(query.shape[0], -1)


def _dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    terms: HostTerms,
    dropout: float,
    scaling: float | None,
    arguments: Mapping[str, Any],
) -> Attended:
    """The host's own call, to the last bit where it attends by SDPA: SDPA's kernels round by the
    form of the mask, so that it gets the one which transformers would have given it."""
    noted = visible_keys_of(terms.mask)
    more = (terms.bias, terms.softcap, terms.sinks, terms.head_mask)
    asked = any(term is not None for term in more) or arguments.get("output_attentions")
    if asked or noted is None:
        return dot_product_attention(module, query, key, value, terms, dropout, scaling, arguments)
    queries, keys = query.shape[2], key.shape[2]
    plain = noted.window is None and noted.key_ranges is None and noted.mask is None
    mask = None
    if not (plain and (queries == 1 or (noted.causal and queries == keys))):
        mask = split_mask(ordinary(terms.mask))[0]  # type: ignore[arg-type]
    causal = {**arguments, "is_causal": mask is None and queries > 1}
    return sdpa_attention_forward(
        module, query, key, value, mask, dropout=dropout, scaling=scaling, **causal
    )


def _refuse_terms(
    module: nn.Module, query: Tensor, terms: HostTerms, arguments: Mapping[str, Any]
) -> None:
    """Raise ValueError for what only dense attention computes."""
    name = type(module).__name__
    dense = (
        "Use densify_attention(model), or `with sparsity(model, attention='dense'):` for a while"
    )
    found = {
        "a position bias": terms.bias,
        "capped scores (softcap)": terms.softcap,
        "attention sinks": terms.sinks,
        "a head mask": terms.head_mask,
        "output_attentions": arguments.get("output_attentions") or None,
    }
    asked = [what for what, value in found.items() if value is not None]
    if asked:
        raise ValueError(
            f"{name}: expected a call that sparse attention can honour, got one with "
            f"{', '.join(asked)}. {dense}"
        )
    noted = visible_keys_of(terms.mask)
    both_ways = terms.mask is None or (noted is not None and noted.everything)
    if both_ways and query.shape[2] > 1:
        raise ValueError(
            f"{name}: expected causal attention, got a call in which all tokens see each other. "
            "Of a model with an encoder or a tower, sparsify the text decoder alone: "
            "sparsify_attention(model.language_model), or attn_implementation="
            f"{{'text_config': {SPARSE_NAME!r}}}"
        )


def register() -> None:
    """Register both attentions, with the mask function that remembers what its masks say."""
    for name, forward in (
        (SPARSE_NAME, sparse_topk_forward),
        (SPARSE_GRAVITY_NAME, sparse_gravity_forward),
    ):
        AttentionInterface.register(name, forward)
        AttentionMaskInterface.register(name, gravity_mask)
