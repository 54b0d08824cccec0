"""Which models sparse attention can serve, and what of it a checkpoint holds."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from ..layers.screening import Screening
from .extras import read_extras
from .own_models import is_own_model
from .placement import execution_device
from .sites import AttentionSite, find_attention_sites
from .sparse_settings import attends_locally
from .support import CAUSAL_IN_NAME_ONLY

_WIDTH_NAMES = ("qk_head_dim", "head_dim", "head_size", "attention_head_size")


def sites_to_sparsify(model: nn.Module) -> list[AttentionSite]:
    """The attention modules of a causal decoder that can choose their keys: those that see the
    whole text. Layers with a sliding window stay as they are.

    Raises:
        TypeError: no transformers model, one of this library's own, or one that has attention which
            is not causal self-attention.
        ValueError: its scores have a term that only dense attention computes, or no layer sees the
            whole text.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"sparsify_attention: expected a transformers PreTrainedModel, got {name}. Load it "
            "with from_pretrained of an Auto class"
        )
    if is_own_model(model):
        raise TypeError(
            f"sparsify_attention: expected a host from transformers, got {name}, one of this "
            "library's own. Of a LeanFormer set attention_top_k in its config; the others attend "
            "densely"
        )
    if getattr(model.config, "is_encoder_decoder", False):
        raise TypeError(
            f"sparsify_attention: expected a causal decoder, got {name}, which has an encoder and "
            "cross attention. Use a decoder-only model"
        )
    sites = find_attention_sites(model)
    both_ways = [site.name for site in sites if not _is_causal(site.module)]
    if both_ways:
        some = "" if len(both_ways) == len(sites) else ". Of the text decoder alone: "
        part = some and "sparsify_attention(model.language_model)"
        raise TypeError(
            f"sparsify_attention: expected causal self-attention only, got {name} with "
            f"{len(both_ways)} modules that are not, such as {both_ways[0]}{some}{part}"
        )
    global_sites = [site for site in sites if not attends_locally(site.module)]
    if not global_sites:
        raise ValueError(
            f"sparsify_attention: expected layers that see the whole text, but all {len(sites)} of "
            f"{name} have a sliding window, which bounds what they look at already. Nothing is "
            "left to choose"
        )
    for site in global_sites:
        _refuse_terms(site)
    return global_sites


def make_screening(site: AttentionSite, screen_dim: int) -> Screening:
    """The child `screening` of one attention module, where the module computes; float32, as it may
    be trained beside a host in half precision."""
    width = _head_dim(site)
    if screen_dim > width:
        raise ValueError(
            f"screen_dim: expected at most the width of a head, {width} in {site.name}, got "
            f"{screen_dim}. Take less, or screening='keys'"
        )
    child = Screening(site.query_heads, site.key_value_heads, width, screen_dim)
    return child.to(execution_device(site.module)).train(site.module.training)


def saved_screenings(model: PreTrainedModel, names: list[str]) -> dict[str, dict[str, Tensor]]:
    """`query` and `key` of the `screening` of each attention module, from the checkpoint that
    `model` was loaded from.

    Raises:
        ValueError: there is none, or one lacks some of them.
    """
    where = getattr(model, "name_or_path", "") or ""
    wanted = {f"{name}.screening.{kind}": (name, kind) for name in names for kind in _KINDS}
    found: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for key, tensor in read_extras(where, wanted).items():
        name, kind = wanted[key]
        found[name][kind] = tensor
    missing = [name for name, tensors in found.items() if len(tensors) < len(_KINDS)]
    if missing:
        raise ValueError(
            f"sparsify_attention: expected the screening of {len(names)} attention modules in "
            f"{where!r}, which config.sparse_attention tells of, {len(missing)} are missing, such "
            f"as {missing[0]}.screening. Give a budget and a screening to begin anew"
        )
    return found


_KINDS = ("query", "key")


def _is_causal(module: nn.Module) -> bool:
    if type(module).__name__ in CAUSAL_IN_NAME_ONLY or getattr(module, "is_cross_attention", False):
        return False
    return getattr(module, "is_causal", False) is True


def _refuse_terms(site: AttentionSite) -> None:
    module: Any = site.module
    cap = getattr(module, "attn_logit_softcapping", None)
    found = {
        "caps its scores": cap is not None,
        "has attention sinks": getattr(module, "sinks", None) is not None,
        "chooses keys by an indexer of its own": getattr(module, "indexer", None) is not None,
    }
    for what, is_so in found.items():
        if is_so:
            raise ValueError(
                f"sparsify_attention: expected dot products or gravity under a softmax, but "
                f"{site.name} ({type(module).__name__}) {what}. It stays dense"
            )
    if hasattr(module, "screening"):
        raise ValueError(
            f"sparsify_attention: expected no attribute `screening` on {site.name} "
            f"({type(module).__name__}), which is where its projections go, found one"
        )


def _head_dim(site: AttentionSite) -> int:
    module, config = site.module, getattr(site.module, "config", None)
    for owner in (module, config):
        for name in _WIDTH_NAMES:
            width = getattr(owner, name, None)
            if isinstance(width, int) and width > 0:
                return width
    hidden = getattr(config, "hidden_size", 0)
    if not hidden or hidden % site.query_heads:
        raise ValueError(
            f"{site.name} ({type(module).__name__}): expected its head width under one of "
            f"{list(_WIDTH_NAMES)}, found none. Use screening='keys', which needs none"
        )
    return hidden // site.query_heads
