"""Loading gravity models: our own folders, Gravity-2's hosts with a mass file, LoRA folders."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from torch import nn
from transformers import AutoModel, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.hub import cached_file

from ..config import GravityConfig
from ..layers.parameters import GravityParameters
from . import hosts
from .autos import MODEL_TYPE_PREFIX
from .mass_log import check_mass_counts, read_mass_log
from .own_models import is_own_config, own_model_class, read_config, refuse_own
from .patching import patch_with_gravity
from .sites import find_attention_sites

Model = TypeVar("Model", bound=nn.Module)

MASS_LOG_NAMES = ("gravity_mass_log.safetensors", "gravity_mass_log.pt")
ADAPTER_CONFIG_NAME = "adapter_config.json"
_HUB_ARGUMENTS = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def load_gravity_model(name_or_path: str | os.PathLike, **kwargs: Any) -> PreTrainedModel:
    """Load any gravity checkpoint; software that would run it as dot product never gets the chance.

    Reads, in this order: a folder or Hub repository saved from a patched model, with maps of low
    rank or without, or from a model that is gravity by construction (LGT, the tri-model); a LoRA
    adapter made by `gravity_lora` (its base is loaded, and patched where it is a host); a plain
    host with Gravity-2's `gravity_mass_log.pt` (or `.safetensors`) beside it.

    Args:
        name_or_path: local folder or Hub repository.
        **kwargs: for `from_pretrained`: `dtype`, `device_map`, `revision`, `token`, ...

    Returns:
        The model, in the class that wrote it, or the `PeftModel` over it for an adapter.

    Raises:
        ValueError: no such kind, settings that do not fit together, or a mass file that does not
            fit the host.
    """
    where = os.fspath(name_or_path)
    hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
    if not _find(where, "config.json", hub) and (adapter := _find(where, ADAPTER_CONFIG_NAME, hub)):
        # Imported here because peft is optional.
        from .adapters import base_of_adapter, load_gravity_adapter

        base = load_host_or_gravity(base_of_adapter(adapter), **kwargs)
        return load_gravity_adapter(base, where, **hub)
    config = read_config(where, **hub)
    if config.model_type.startswith(MODEL_TYPE_PREFIX) or is_own_config(config):
        return load_host_or_gravity(where, **kwargs)
    found = (_find(where, name, hub) for name in MASS_LOG_NAMES)
    mass_log = next((path for path in found if path is not None), None)
    if mass_log is None:
        raise ValueError(
            f"{where}: expected a gravity model (model_type gravity_... or lgt, a gravity adapter, "
            f"or {MASS_LOG_NAMES[1]} beside the weights), got a plain {config.model_type}. Load it "
            f"with {_loader_of(config)} and convert it: patch_with_gravity(model), "
            "calibrate(model, ...)"
        )
    return load_gravity_mass_log(load_host_or_gravity(where, **kwargs), mass_log)


def load_gravity_mass_log(model: Model, path: str | os.PathLike) -> Model:
    """Give `model` the masses of a Gravity-2 file; patches it first if it is not patched.

    Gravity-2 is the force law over euclidean distance with epsilon 0.1, the default settings. The
    granularity (query head, KV head, layer) follows from the file.

    Args:
        model: a host, or a model patched with one mass for each in the file.
        path: `gravity_mass_log.pt` or `.safetensors`; accepted layouts: see `read_mass_log`. Never
            runs code from the file.

    Returns:
        The same object. Nothing is changed when the file does not fit.

    Raises:
        ValueError: the file is not such a file, or does not fit the model.
        TypeError: the model is gravity by construction.
    """
    refuse_own(model, "load_gravity_mass_log", "Its masses come from its hidden states")
    patched = hosts.settings_of(model)
    settings = patched or GravityConfig()
    if settings.distance != "euclidean" or settings.law != "force":
        raise ValueError(
            f"{path}: Gravity-2's masses belong to law 'force' and distance 'euclidean', got a "
            f"model with {settings.law!r} and {settings.distance!r}. Load them into a fresh host"
        )
    sites = hosts.select_sites(find_attention_sites(model), settings)
    rows = read_mass_log(path, [site.name for site in sites])
    granularity = check_mass_counts(rows, [(s.query_heads, s.key_value_heads) for s in sites])
    if patched:
        _check_counts(path, hosts.gravity_modules(model), rows, settings.mass_per)
    else:
        patch_with_gravity(model, GravityConfig(mass_per=granularity))
    with torch.no_grad():
        modules = hosts.gravity_modules(model)
        for site, row in zip(sites, rows, strict=True):
            modules[site.name].mass_log.copy_(row)
    return model


def load_host_or_gravity(where: str, **kwargs: Any) -> PreTrainedModel:
    """`from_pretrained` of the class that `config.json` names, gravity or not; `load_factorized`
    where it names maps of low rank."""
    # Imported here because it finds classes by this module.
    from .factorized_folder import KEY, load_factorized

    hub = {key: kwargs[key] for key in _HUB_ARGUMENTS if key in kwargs}
    config = read_config(where, **hub)
    if getattr(config, KEY, None) is not None:
        return load_factorized(where, **kwargs)
    return model_class_of(config).from_pretrained(where, **kwargs)


def _loader_of(config: PreTrainedConfig) -> str:
    from .factorized_folder import KEY

    return "its Auto class" if getattr(config, KEY, None) is None else "gravity_hf.load_factorized"


def model_class_of(config: PreTrainedConfig) -> Any:
    """The class that wrote a checkpoint; an Auto class where `config.json` does not say.

    ValueError where it names a class that a model of this library's own does not have.
    """
    if is_own_config(config):
        return own_model_class(config)
    ours = isinstance(config, hosts.GravityHostConfig)
    for name in config.architectures or ():
        # A host with a part that was patched on its own names its own class.
        cls = getattr(transformers, name.removeprefix(hosts.CLASS_PREFIX) if ours else name, None)
        if cls is not None:
            # Some model types share a class, and differ in their config.
            return hosts.gravity_model_class(cls, type(config)) if ours else cls
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return transformers.AutoModelForCausalLM
    return AutoModel


def _check_counts(
    path: str | os.PathLike,
    modules: Mapping[str, GravityParameters],
    rows: list[torch.Tensor],
    mass_per: str,
) -> None:
    for (name, module), row in zip(modules.items(), rows, strict=True):
        if module.mass_log.is_meta:
            raise RuntimeError(
                f"{path}: expected masses in memory, got offloaded ones in {name}, where new "
                "values would be lost. Load the model without device_map, load the file, save"
            )
        if row.numel() != module.mass_count:
            raise ValueError(
                f"{path}: {name}: expected {module.mass_count} masses (the model has one per "
                f"{mass_per}), got {row.numel()}. Load the file into an unpatched host instead"
            )


def _find(where: str, name: str, hub: dict[str, Any]) -> str | None:
    if os.path.isdir(where):
        path = Path(where, name)
        return str(path) if path.is_file() else None
    return cached_file(
        where,
        name,
        _raise_exceptions_for_gated_repo=False,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        **hub,
    )
