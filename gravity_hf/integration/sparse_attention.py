"""`sparsify_attention`, `densify_attention`: all checks first, then all changes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ..layers.screening import Screening
from ..ops.sparse import KeyBudget
from .guards import unwatch, watch
from .hosts import GravityHost
from .implementations import ATTENTION_NAME, configs_of
from .patching import refuse_wrapped
from .screening_fit import fit_principal
from .sites import AttentionSite
from .sparse_forward import register
from .sparse_hosts import make_screening, saved_screenings, sites_to_sparsify
from .sparse_settings import (
    SETTINGS_KEY,
    SPARSE_GRAVITY_NAME,
    SPARSE_NAME,
    SparseSettings,
    budget_from,
    settings_in,
    sparse_modules,
    sparse_settings_of,
)

Model = TypeVar("Model", bound=nn.Module)

_NOTE = "_sparse_host_attention"
_NAMES = (SPARSE_NAME, SPARSE_GRAVITY_NAME)

register()


class _Plan(NamedTuple):
    """Everything that can fail, done beforehand."""

    name: str
    settings: SparseSettings
    sites: list[AttentionSite]
    screenings: list[Screening | None]


def sparsify_attention(
    model: Model,
    budget: KeyBudget | Mapping[str, Any] | None = None,
    *,
    screening: str | None = None,
    screen_dim: int = 16,
    calibration: Iterable[Mapping[str, Any]] | None = None,
) -> Model:
    """Let each query of a causal decoder attend to the few keys that a budget has, in place.

    >>> sparsify_attention(model, KeyBudget(top_k=512, block_size=32, window=64))
    >>> sparsify_attention(model, KeyBudget(top_k=512), screening="principal", calibration=batches)

    The order is: load, `patch_with_gravity` where gravity is wanted, sparsify, LoRA. Weights are
    not changed, and layers with a sliding window stay as they are. With projections each attention
    module gets a child `screening`, which `save_pretrained` writes among the weights and a plain
    load reports as unexpected and leaves out; the settings are in `config.sparse_attention`. After
    loading, `sparsify_attention(model)` reads both again.

    Args:
        model: any transformers decoder whose attention goes through AttentionInterface.
        budget: how many keys, or its settings as a dict; None: those of the checkpoint, or the
            defaults of `KeyBudget`.
        screening: by what keys are chosen; None: as the checkpoint has it, or "keys".
            "keys": queries and keys themselves; "learned": projections that `fit_screening`
            trains, random until then; "principal": projections onto the directions in which the
            keys of `calibration` vary most.
        screen_dim: width of the projections.
        calibration: model inputs as dicts of tensors, for "principal".

    Returns:
        The same object. Calling it again with the same settings changes nothing.

    Raises:
        TypeError: a model with an encoder, cross attention or towers; one of this library's own.
        ValueError: settings that do not fit, attention with a term that only dense attention
            computes (capped scores, sinks, an indexer), or a sliding window in every layer.
        RuntimeError: wrong order (already under LoRA, compiled or wrapped), or sparse already with
            other settings.
    """
    saved = settings_in(getattr(model, "config", None))
    restored = saved is not None and budget is None and screening is None
    settings = SparseSettings(budget_from(budget), screening or "keys", screen_dim)
    if saved is not None and restored:
        settings = saved
    current = sparse_settings_of(model)
    if current == settings:
        return model
    if current is not None:
        raise RuntimeError(
            f"sparsify_attention: sparse already with {current}, asked for {settings}. Call "
            "densify_attention(model) first"
        )
    batches = list(calibration or ())
    plan = _plan(model, settings, restored, batches)
    _apply(model, plan)
    if settings.screening == "principal" and not restored:
        fit_principal(model, batches)
    return model


def densify_attention(model: Model) -> Model:
    """Undo `sparsify_attention`: the host again, bit for bit.

    Raises:
        RuntimeError: the model is not sparse, or is wrapped.
    """
    refuse_wrapped(model, "densify_attention", "first model.unload() or model.merge_and_unload()")
    if sparse_settings_of(model) is None:
        raise RuntimeError(
            f"densify_attention: expected a model made sparse by sparsify_attention, got "
            f"{type(model).__name__}, which is not"
        )
    for module in sparse_modules(model).values():
        for name in ("sparse_settings", "attention_policy"):
            vars(module).pop(name, None)
        if "screening" in module._modules:
            del module.screening
        if _unwatch(module) and "gravity" in module._modules:
            watch(module)
    _restore(model, model.__dict__.pop(_NOTE))
    model.config.__dict__.pop(SETTINGS_KEY, None)
    return model


def _plan(model: Any, settings: SparseSettings, restored: bool, batches: list[Any] | None) -> _Plan:
    refuse_wrapped(
        model,
        "sparsify_attention",
        "expected this order: load, patch_with_gravity, sparsify_attention, LoRA, then compile",
    )
    sites = sites_to_sparsify(model)
    if settings.screening == "principal" and not restored and not batches:
        raise ValueError(
            "sparsify_attention: screening='principal' finds directions of keys: expected "
            "calibration=[...], model inputs such as {'input_ids': ids}, got none"
        )
    screenings: list[Screening | None] = [None] * len(sites)
    if settings.has_projections:
        screenings = [make_screening(site, settings.screen_dim) for site in sites]
    if restored and settings.has_projections:
        saved = saved_screenings(model, [site.name for site in sites])
        for site, child in zip(sites, screenings, strict=True):
            child.load_state_dict(saved[site.name])  # type: ignore[union-attr]
    name = SPARSE_GRAVITY_NAME if isinstance(model, GravityHost) else SPARSE_NAME
    return _Plan(name, settings, sites, screenings)


def _apply(model: PreTrainedModel, plan: _Plan) -> None:
    originals = [(config, config._attn_implementation) for config in configs_of(model)]
    # As the class itself would: a gravity class refuses to be told.
    PreTrainedModel.set_attn_implementation(model, plan.name)
    for site in plan.sites:
        reached = getattr(site.module, "config", model.config)
        if reached._attn_implementation != plan.name:
            # transformers only logs when it cannot set an implementation; what it set is undone.
            _restore(model, originals)
            raise TypeError(
                f"{type(model).__name__} does not let its attention implementation be set; "
                f"expected {plan.name!r} in {site.name}, got {reached._attn_implementation!r}"
            )
    model.__dict__[_NOTE] = originals
    setattr(model.config, SETTINGS_KEY, plan.settings.to_dict())
    for site, screening in zip(plan.sites, plan.screenings, strict=True):
        vars(site.module)["sparse_settings"] = plan.settings
        vars(site.module)["attention_policy"] = "sparse"
        if screening is not None:
            site.module.screening = screening
        if "gravity" in site.module._modules:
            unwatch(site.module)
            site.module.register_forward_pre_hook(_only_sparse_gravity)


def _restore(model: Any, originals: list[tuple[PreTrainedConfig, str | None]]) -> None:
    for config, implementation in originals:
        config._attn_implementation_internal = implementation
    for config in configs_of(model):
        vars(config).pop("_attn_was_changed", None)
        # Of a model that was unpatched meanwhile.
        if not isinstance(model, GravityHost) and config._attn_implementation == ATTENTION_NAME:
            config._attn_implementation_internal = model.get_correct_attn_implementation(None)


def _only_sparse_gravity(module: nn.Module, _: Any) -> None:
    """As the guard that `watch` sets, of a module whose gravity is sparse."""
    name = getattr(getattr(module, "config", None), "_attn_implementation", SPARSE_GRAVITY_NAME)
    if "gravity" in module._modules and name not in (ATTENTION_NAME, SPARSE_GRAVITY_NAME):
        raise ValueError(
            f"{type(module).__name__}: expected config._attn_implementation "
            f"{SPARSE_GRAVITY_NAME!r} or {ATTENTION_NAME!r}, got {name!r}, set after the model was "
            "made: dot-product attention on weights made for gravity. To go back, call "
            "densify_attention(model)"
        )


def _unwatch(module: nn.Module) -> bool:
    """Take the guard of a sparse module away; whether there was one."""
    hooks = module._forward_pre_hooks
    ours = [key for key, hook in hooks.items() if hook is _only_sparse_gravity]
    for key in ours:
        del hooks[key]
    return bool(ours)
