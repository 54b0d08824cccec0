"""`patch_with_gravity`, `unpatch_gravity`, `gravity_status`: all checks first, then all changes."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.utils import logging
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from ..config import GravityConfig
from ..layers.parameters import GravityParameters
from ..ops.api import explain_implementation
from .carrier import is_served
from .guards import unwatch, watch
from .hosts import (
    CLASS_PREFIX,
    GravityHost,
    GravityHostConfig,
    gravity_config_class,
    gravity_model_class,
    gravity_modules,
    host_of,
    is_native,
    make_child,
    select_sites,
    settings_of,
)
from .implementations import ATTENTION_NAME, configs_of, name_gravity, restore_attention
from .own_models import (
    gravity_in_words,
    is_own_model,
    other_attention_names,
    own_attention_names,
    own_gravity_parameters,
    refuse_own,
    sizes_in_words,
)
from .placement import execution_device
from .sites import AttentionSite, find_attention_sites, find_own_attention
from .sparse_settings import SPARSE_GRAVITY_NAME, sparse_settings_of
from .tensor_parallel import refuse_split

logger = logging.get_logger(__name__)

Model = TypeVar("Model", bound=nn.Module)

_RIGHT_ORDER = "load, patch_with_gravity, LoRA, then compile or wrap"
# What else than "sdpa" an attention implementation stands for in models of this library's own.
_OWN_IMPLEMENTATIONS = {"eager": "reference", "flex_attention": "flex"}


@dataclass(frozen=True)
class GravityStatus:
    """What is patched, with what, by which implementation.

    `layers`: converted attention modules; `skipped`: those that keep dot-product attention, by
    choice or because they compute attention on their own; `implementation`: what computes gravity
    where the model is now, `reason`: why that; `parameters`: added numbers.

    Of a model that is gravity by construction (LGT, the tri-model, NGT) nothing is patched and
    `config` is None: `own` says its sizes, law, distance and cap, a line each; `layers` are all of
    its attention modules, `skipped` what else attends (the tri-model's fusion), `parameters` all
    numbers in its gravity, positions included. A twin of an NGT has no gravity: `layers` is empty.
    `own` is empty for hosts.
    """

    patched: bool
    model: str
    config: GravityConfig | None
    layers: tuple[str, ...]
    skipped: tuple[str, ...]
    implementation: str
    parameters: int
    reason: str = ""
    own: tuple[str, ...] = ()

    @property
    def is_gravity(self) -> bool:
        """Whether attention is gravity: patched in, or by construction."""
        return self.patched or bool(self.own and self.layers)

    def __str__(self) -> str:
        if self.own:
            return "\n".join(self._own_lines())
        if not self.patched or self.config is None:
            return f"{self.model}: not patched ({self.implementation} attention)"
        config = self.config
        lines = [
            f"{self.model}: gravity in {len(self.layers)} attention modules",
            f"  law {config.law}, distance {config.distance}, {config.softness_in_words}",
            f"  one mass per {config.mass_per}, {self.parameters} added numbers",
            f"  implementation {self.implementation}: {self.reason}",
        ]
        if self.skipped:
            lines.append(f"  dot product kept in {len(self.skipped)}: {', '.join(self.skipped)}")
        return "\n".join(lines)

    def _own_lines(self) -> list[str]:
        what = f"gravity by construction in {len(self.layers)} attention modules"
        if not self.layers:
            what = "no gravity"
        lines = [
            f"{self.model}: {what}",
            *(f"  {line}" for line in self.own),
            f"  {self.parameters} numbers in the constants of gravity, in masses and in positions",
            f"  implementation {self.implementation}: {self.reason}",
        ]
        if self.skipped:
            lines.append(f"  dot product in {len(self.skipped)}: {', '.join(self.skipped)}")
        return lines


class _Plan(NamedTuple):
    """Everything that can fail, done beforehand: what to attach where, and the new classes."""

    children: list[tuple[AttentionSite, GravityParameters]]
    settings: GravityConfig
    model_class: type[PreTrainedModel]
    config_class: type[PreTrainedConfig]


def patch_with_gravity(model: Model, config: GravityConfig | None = None) -> Model:
    """Replace dot-product attention by gravity in `model`, in place.

    The order is: load, patch, LoRA, then compile or wrap. Straight after patching with the default
    constants a pretrained model is far from itself; `calibrate` brings it back.

    Args:
        model: any transformers model whose attention goes through AttentionInterface.
        config: the settings; None takes `GravityConfig()`, the constants of Gravity-2.

    Returns:
        The same object. Patching again with the same settings changes nothing.

    Raises:
        TypeError: not a transformers model, its attention cannot be replaced, or it is gravity
            already, by construction.
        ValueError: the settings do not fit the model, or its attention has an argument that gravity
            cannot honour.
        RuntimeError: wrong order (already under LoRA, compiled or wrapped), or already patched with
            other settings.
    """
    settings = GravityConfig() if config is None else config
    if settings_of(model) == settings:
        return model
    if settings.distance == "lifted":
        raise ValueError(
            "patch_with_gravity: distance 'lifted' needs key radii measured on data. Patch with "
            "distance='euclidean', then calibrate(model, batches) lifts the keys"
        )
    patch_structure(model, settings)
    return model


def patch_structure(model: nn.Module, settings: GravityConfig) -> None:
    """`patch_with_gravity` for callers that fill in the gravity tensors themselves, key radii
    included: loaders."""
    _apply(model, _plan(model, settings))


def unpatch_gravity(model: Model) -> Model:
    """Undo `patch_with_gravity`: the host again, bit for bit, its class and state-dict keys too.

    Raises:
        RuntimeError: the model is not patched, or a LoRA adapter still holds copies of the masses.
        TypeError: it is gravity by construction.
    """
    refuse_wrapped(model, "unpatch_gravity", "first model.unload() or model.merge_and_unload()")
    refuse_own(model, "unpatch_gravity", "There is no host under it to go back to")
    if not isinstance(model, GravityHost):
        raise RuntimeError(f"unpatch_gravity: {type(model).__name__} is not patched")
    for name in gravity_modules(model):
        module = model.get_submodule(name)
        del module.gravity
        unwatch(module)
    # None of a model that was loaded from a checkpoint: never anything else in this process.
    restore_attention(model, model.__dict__.pop("_gravity_host_attention", ()))
    host_config = model.config
    for key in ("gravity", "auto_map"):
        host_config.__dict__.pop(key, None)
    if host_config.architectures:
        names = [name.removeprefix(CLASS_PREFIX) for name in host_config.architectures]
        host_config.architectures = names
    _change_class(model, host_of(type(model)), host_of(type(host_config)))
    return model


def gravity_status(model: nn.Module) -> GravityStatus:
    """What is patched in `model`, with what, and how it is computed. Works under peft, too.

    Of a model that is gravity by construction: its law and sizes; see `GravityStatus.own`.
    """
    modules = gravity_modules(model)
    host: Any = model.get_base_model() if _is_peft(model) else model  # type: ignore[operator]
    if is_own_model(host):
        return _status_of_own(host)
    settings = settings_of(host)
    current = getattr(getattr(host, "config", None), "_attn_implementation", None) or "own"
    if is_served(getattr(host, "config", None)):
        current = ATTENTION_NAME
    if settings is None:
        return GravityStatus(False, type(host).__name__, None, (), (), current, 0)
    sites = find_attention_sites(host)
    converted = tuple(site.name for site in sites if hasattr(site.module, "gravity"))
    kept = tuple(site.name for site in sites if not hasattr(site.module, "gravity"))
    implementation, reason = current, "set in place of gravity"
    sparse = current == SPARSE_GRAVITY_NAME
    if sparse:
        implementation, reason = "sparse", "sparsify_attention: few keys for each query"
    elif current == ATTENTION_NAME:
        implementation, reason = _implementation(host, settings.implementation)
    return GravityStatus(
        patched=sparse or current == ATTENTION_NAME,
        model=type(host).__name__,
        config=settings,
        layers=converted,
        skipped=kept + find_own_attention(host),
        implementation=implementation,
        parameters=sum(p.numel() for m in modules.values() for p in m.parameters()),
        reason=reason,
    )


def _status_of_own(model: PreTrainedModel) -> GravityStatus:
    config = model.config
    named = getattr(config, "_attn_implementation", None)
    # A companion has none: its geolip does. A prior has no gravity.
    inner = getattr(config, "geolip", config)
    asked = getattr(inner, "implementation", "auto")
    asked = _OWN_IMPLEMENTATIONS.get(named or "", asked)
    implementation, reason = _implementation(model, asked)
    own = {id(parameter) for parameter in own_gravity_parameters(model)}
    # Under peft the frozen originals stand beside the copies in force.
    counted = (p for n, p in model.named_parameters() if ".original_module." not in n)
    layers = own_attention_names(model)
    if not layers:
        implementation, reason = "sdpa", "dot products have PyTorch's own"
    return GravityStatus(
        patched=False,
        model=type(model).__name__,
        config=None,
        layers=layers,
        skipped=other_attention_names(model),
        implementation=implementation,
        parameters=sum(p.numel() for p in counted if id(p) in own),
        reason=reason,
        own=(sizes_in_words(config), *gravity_in_words(config)),
    )


def _implementation(model: nn.Module, asked: str) -> tuple[str, str]:
    """What computes gravity in `model` on its device, and why."""
    if asked != "auto":
        return asked, "as the settings name it"
    dtypes = (p.dtype for p in model.parameters() if p.is_floating_point())
    device = execution_device(model) or torch.device("cpu")
    return explain_implementation(
        device, next(dtypes, torch.get_default_dtype()), _softcap_of(model)
    )


def _softcap_of(model: nn.Module) -> float | None:
    caps = (getattr(m, "attn_logit_softcapping", None) for m in model.modules())
    return next((cap for cap in caps if cap is not None), None)


def _plan(model: nn.Module, settings: GravityConfig) -> _Plan:
    refuse_wrapped(model, "patch_with_gravity", f"expected this order: {_RIGHT_ORDER}")
    refuse_split(model, "patch_with_gravity")
    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"patch_with_gravity: expected a transformers PreTrainedModel, got "
            f"{type(model).__name__}. Load it with from_pretrained of an Auto class"
        )
    if isinstance(model, GravityHost):
        raise RuntimeError(
            f"patch_with_gravity: already patched with {settings_of(model)}, asked for "
            f"{settings}. Call unpatch_gravity(model) first"
        )
    if isinstance(model.config, GravityHostConfig):
        raise ValueError(
            f"patch_with_gravity: expected a config of the model's own, got one that another "
            f"patched model uses too ({type(model.config).__name__}). Build each model from "
            "copy.deepcopy(config); of a part of a model, patch the whole"
        )
    refuse_own(
        model,
        "patch_with_gravity",
        "There is nothing to patch: train and use it as it is; gravity_status(model) shows its law",
    )
    if sparse_settings_of(model) is not None:
        raise RuntimeError(
            "patch_with_gravity: expected this order: patch_with_gravity, then sparsify_attention; "
            "got a model that is sparse already. Call densify_attention(model) first"
        )
    sites = select_sites(find_attention_sites(model), settings)
    _check_implementation(model, sites, settings.implementation)
    for site in sites:
        if hasattr(site.module, "gravity"):
            raise ValueError(
                f"{site.name} ({type(site.module).__name__}): expected no attribute `gravity`, "
                "which is where its masses go, found one"
            )
        if site.query_heads % site.key_value_heads:
            raise ValueError(
                f"{site.name}: expected query heads a multiple of KV heads, got "
                f"{site.query_heads} and {site.key_value_heads}"
            )
    if not is_native(type(model)):
        # Said now, not after a long training run: see GravityHost.save_pretrained.
        logger.warning(
            f"patch_with_gravity: {type(model).__name__} is not part of transformers. It can be "
            "patched, trained and unpatched, but save_pretrained will refuse it: its name could "
            "not bring it back. Save its state_dict() instead"
        )
    config_class = gravity_config_class(type(model.config))
    model_class = gravity_model_class(type(model), config_class)
    children = [(s, make_child(s, settings, device=execution_device(s.module))) for s in sites]
    return _Plan(children, settings, model_class, config_class)


def _check_implementation(
    model: nn.Module, sites: Iterable[AttentionSite], implementation: str
) -> None:
    """Raise ValueError if the implementation named lacks a term of the host's attention."""
    term = None
    if implementation in ("flex", "triton") and _softcap_of(model) is not None:
        term = "capped scores"
    elif implementation == "flex" and any(hasattr(site.module, "sinks") for site in sites):
        term = "attention sinks"
    if term is not None:
        raise ValueError(
            f"GravityConfig.implementation: expected one that serves {term}, which "
            f"{type(model).__name__} has, got {implementation!r}. Use 'auto' or 'chunked'"
        )


def _apply(model: PreTrainedModel, plan: _Plan) -> None:
    originals = [(config, config._attn_implementation) for config in configs_of(model)]
    name_gravity(model)
    for site, _ in plan.children:
        reached = getattr(site.module, "config", model.config)._attn_implementation
        if reached != ATTENTION_NAME:
            # transformers only logs when it cannot set an implementation; what it set is undone.
            restore_attention(model, originals)
            raise TypeError(
                f"{type(model).__name__} does not let its attention implementation be set; "
                f"expected 'gravity' in {site.name}, got {reached!r}"
            )
    _change_class(model, plan.model_class, plan.config_class)
    model.config.gravity = plan.settings.to_dict()
    model.__dict__["_gravity_host_attention"] = originals
    for site, child in plan.children:
        site.module.gravity = child
        watch(site.module)


def _change_class(model: Any, model_class: type, config_class: type) -> None:
    recorded = dict.get(_CAN_RECORD_REGISTRY, str(model.__class__))
    model.config.__class__ = config_class
    model.__class__ = model_class
    # What a class can record (hidden states) is looked up by the class's name.
    dict.__setitem__(_CAN_RECORD_REGISTRY, str(model_class), recorded)


def _is_peft(model: nn.Module) -> bool:
    peft = sys.modules.get("peft")
    return peft is not None and isinstance(model, peft.PeftModel)


def refuse_wrapped(model: nn.Module, what: str, next_step: str) -> None:
    """Raise RuntimeError if `model` is under LoRA, compiled, or wrapped for distribution."""
    wrapper = None
    if _is_peft(model) or getattr(model, "_hf_peft_config_loaded", False):
        wrapper = "a model with a LoRA adapter"
    elif "peft" in sys.modules and _has_tuner_layers(model):
        wrapper = "a model with adapter layers"
    elif hasattr(model, "_orig_mod"):
        wrapper = "a compiled model"
    elif type(model).__name__.startswith(("FSDP", "FullyShardedDataParallel")):
        wrapper = "a model wrapped by FSDP"
    elif isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        wrapper = "a model wrapped for data parallelism"
    if wrapper is not None:
        raise RuntimeError(f"{what}: expected a bare model, got {wrapper}; {next_step}")


def _has_tuner_layers(model: nn.Module) -> bool:
    layer = sys.modules["peft"].tuners.tuners_utils.BaseTunerLayer
    return any(isinstance(module, layer) for module in model.modules())
