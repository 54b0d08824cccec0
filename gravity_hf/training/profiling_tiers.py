"""Ways to run one model: what is left out or rounded in each, and how a model is put into it."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from transformers import DynamicCache, PreTrainedModel

from ..integration.rotated_cache import RotatedQuantCache
from ..integration.sparse_attention import densify_attention, sparsify_attention
from ..layers.sparse_feed_forward import SparseFeedForward
from ..layers.sparsity_policy import sparsity
from ..ops.sparse import KeyBudget

FULL, LEAN = "full", "lean"


@dataclass(frozen=True)
class Tier:
    """One way to run a model. None leaves what the full tier has.

    feed_forward: "block" computes the chosen blocks of neurons only. attention: "sparse" attends to
    the chosen keys only, `top_k` of them on a host that knows no choice itself. exit_threshold:
    tokens may leave from this probability on. dtype: of weights and arithmetic. cache: "packed" is
    a `RotatedQuantCache` of 4 bits.
    """

    name: str
    description: str
    feed_forward: str | None = None
    attention: str | None = None
    top_k: int | None = None
    exit_threshold: float | None = None
    dtype: str | None = None
    cache: str = "dynamic"

    def to_dict(self) -> dict[str, Any]:
        """Without what is left as in the full tier."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def tiers_of(
    model: PreTrainedModel, *, top_k: int = 256, exit_threshold: float | None = None
) -> list[Tier]:
    """The tiers that could be of use to this model, the full one first; with all of it together,
    "lean", last.

    Args:
        top_k: keys of a token under sparse attention, on hosts made sparse for it.
        exit_threshold: of a model with an exit head; None: that of its config.
    """
    found = [Tier(FULL, "all neurons, all keys, all layers, as it was loaded")]
    has_choice = _chooses_keys(model)
    keys = None if has_choice else top_k
    count = "the keys that its screening chooses" if has_choice else f"{top_k} keys of a token"
    found.append(Tier("sparse-attention", count, attention="sparse", top_k=keys))
    if _chooses_neurons(model):
        found.append(
            Tier("sparse-feed-forward", "the neurons that are chosen", feed_forward="block")
        )
    if getattr(model.config, "has_exits", False):
        threshold = model.config.exit_threshold if exit_threshold is None else exit_threshold
        if threshold is not None:
            words = f"tokens leave from {threshold:.3g} on"
            found.append(Tier("early-exit", words, exit_threshold=float(threshold)))
    if model.dtype == torch.float32:
        found.append(Tier("half", "weights in bfloat16", dtype="bfloat16"))
    found.append(Tier("packed-cache", "keys and values in 4 bits", cache="packed"))
    return [*found, combined(found[1:])]


def combined(tiers: list[Tier]) -> Tier:
    """All of several tiers at once, as "lean"."""
    settings: dict[str, Any] = {}
    for tier in tiers:
        settings |= tier.to_dict()
    changed = {n: v for n, v in settings.items() if n not in ("name", "description")}
    # "dynamic" is what every tier says that leaves the cache alone.
    if any(tier.cache == "packed" for tier in tiers):
        changed["cache"] = "packed"
    return Tier(LEAN, " + ".join(tier.name for tier in tiers), **changed)


def new_cache(model: PreTrainedModel, tier: Tier) -> Any:
    """An empty cache of the tier. The packed one packs from its first block on, however short the
    prompt."""
    if tier.cache == "packed":
        return RotatedQuantCache(config=model.config, min_length=0)
    return DynamicCache(config=model.config)


@contextmanager
def applied(model: PreTrainedModel, tier: Tier) -> Iterator[None]:
    """`model` in the tier; afterwards as it was. For `dtype` see `in_dtype`.

    Raises:
        TypeError, ValueError, RuntimeError: the tier does not go with the model.
    """
    with ExitStack() as stack:
        if _chooses_neurons(model):
            stack.enter_context(sparsity(model, feed_forward=tier.feed_forward or "dense"))
        if _chooses_keys(model):
            stack.enter_context(sparsity(model, attention=tier.attention or "dense"))
        elif tier.attention == "sparse":
            sparsify_attention(model, _budget(tier.top_k or KeyBudget().top_k))
            stack.callback(densify_attention, model)
        if hasattr(model.config, "exit_threshold"):
            before = model.config.exit_threshold
            model.config.exit_threshold = tier.exit_threshold
            stack.callback(setattr, model.config, "exit_threshold", before)
        yield


def in_dtype(model: PreTrainedModel, tier: Tier) -> PreTrainedModel:
    """The model itself, or a copy of it in the tier's dtype."""
    if tier.dtype is None:
        return model
    return copy.deepcopy(model).to(getattr(torch, tier.dtype))


def _budget(top_k: int) -> KeyBudget:
    """With no more of them in the window and the first keys than the choice can spare."""
    usual = KeyBudget()
    window = min(usual.window, max(1, top_k // 4))
    return KeyBudget(top_k=top_k, window=window, sinks=min(usual.sinks, top_k // 16))


def _chooses_neurons(model: nn.Module) -> bool:
    return any(isinstance(module, SparseFeedForward) for module in model.modules())


def _chooses_keys(model: nn.Module) -> bool:
    return any(hasattr(module, "attention_policy") for module in model.modules())
