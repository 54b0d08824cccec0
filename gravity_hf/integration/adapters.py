"""LoRA adapters of patched models: their settings travel in `adapter_config.json`.

peft would put such an adapter on an unpatched base without a word and drop the masses. On disk it
therefore has a type of its own, which peft alone does not know; in memory it is the LoRA that it
is. Once this module is imported peft knows the type, and refuses bases that are not patched.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import load_peft_weights
from torch import nn
from transformers import PreTrainedModel
from transformers.utils.hub import cached_file

from ..config import GravityConfig
from .guards import GRAVITY_LORA
from .hosts import gravity_modules, select_sites, settings_of
from .own_models import is_own_model
from .patching import patch_structure, unpatch_gravity
from .publishing import route_adapters
from .sites import find_attention_sites

_CONFIG_NAME = "adapter_config.json"
# Adapters were LoRA on disk, too, before they had a type of their own.
_KINDS = (GRAVITY_LORA, "LORA")


@dataclass
class GravityLoraConfig(LoraConfig):
    """peft's LoraConfig plus `gravity`, the settings of the patch under the adapter."""

    gravity: dict[str, Any] | None = field(
        default=None, metadata={"help": "Settings of the gravity patch under this adapter."}
    )

    def to_dict(self) -> dict[str, Any]:
        """As in peft, with the type that an adapter has on disk."""
        values: dict[str, Any] = super().to_dict()
        return values if self.gravity is None else {**values, "peft_type": GRAVITY_LORA}


def load_gravity_adapter(
    model: PreTrainedModel,
    name_or_path: str | os.PathLike,
    *,
    patch: bool = True,
    is_trainable: bool = False,
    **hub: Any,
) -> PeftModel:
    """Put a gravity adapter (LoRA and masses) on `model`.

    Args:
        model: the adapter's base: unpatched, or patched with the adapter's settings; or a model
            that is gravity by construction (LGT).
        name_or_path: folder or Hub repository written by a `gravity_lora` model.
        patch: patch an unpatched base as the adapter says; False refuses it.
        is_trainable: go on training the adapter.
        **hub: `revision`, `token`, `cache_dir`, ... for the Hub.

    Raises:
        ValueError: not a gravity adapter, masses missing, or a base patched otherwise.
        RuntimeError: the base is unpatched and `patch` is False.
    """
    where = os.fspath(name_or_path)
    config = _read_config(where, hub)
    if is_own_model(model) and config.gravity is None:
        return _on_own_model(model, where, config, is_trainable, hub)
    settings = _settings(where, config)
    weights = load_peft_weights(where, device="cpu", **hub)
    patched = settings_of(model)
    fresh = patched is None
    if fresh and not patch:
        raise RuntimeError(
            f"{where}: this adapter was trained on gravity attention, expected a patched base, got "
            f"{type(model).__name__}. Call patch_with_gravity first, or pass patch=True"
        )
    if not fresh and patched != settings:
        raise ValueError(
            f"{where}: expected a base patched with {settings}, got {patched}. "
            "Load the adapter onto an unpatched base"
        )
    _check_tensors(where, model, settings, set(weights))
    if not fresh:
        return PeftModel.from_pretrained(
            model, where, config=config, is_trainable=is_trainable, **hub
        )
    patch_structure(model, settings)
    try:
        _fill(model, weights)
        return PeftModel.from_pretrained(
            model, where, config=config, is_trainable=is_trainable, **hub
        )
    except Exception:
        if not hasattr(model, "peft_config"):
            unpatch_gravity(model)
        raise


def _on_own_model(
    model: PreTrainedModel,
    where: str,
    config: GravityLoraConfig,
    is_trainable: bool,
    hub: dict[str, Any],
) -> PeftModel:
    """An adapter without settings of a patch, on a base that needs none."""
    weights = load_peft_weights(where, device="cpu", **hub)
    known = {name for name, _ in model.named_parameters()}
    stored = (name.removeprefix("base_model.model.") for name in weights if ".gravity." in name)
    foreign = sorted(name for name in stored if "lora_" not in name and name not in known)
    if foreign:
        raise ValueError(
            f"{where}: expected the gravity of a {type(model).__name__} of this size, got "
            f"{foreign[0]}. The adapter belongs to another base"
        )
    return PeftModel.from_pretrained(model, where, config=config, is_trainable=is_trainable, **hub)


def base_of_adapter(adapter_config_file: str) -> str:
    """The base model's name in an `adapter_config.json`."""
    with open(adapter_config_file, encoding="utf-8") as file:
        base = json.load(file).get("base_model_name_or_path")
    if not base:
        raise ValueError(
            f"{adapter_config_file}: expected base_model_name_or_path, got {base!r}. Load the base "
            "yourself and call load_gravity_adapter(model, folder)"
        )
    return base


def _read_config(where: str, hub: dict[str, Any]) -> GravityLoraConfig:
    path = os.path.join(where, _CONFIG_NAME)
    if not os.path.isdir(where):
        path = cached_file(where, _CONFIG_NAME, **hub)
    if not os.path.isfile(path):
        raise ValueError(f"{where}: expected a LoRA adapter, found no {_CONFIG_NAME}")
    values = GravityLoraConfig.from_json_file(path)
    kind = values.pop("peft_type", None)
    if kind not in _KINDS:
        raise ValueError(f"{where}: expected a LoRA adapter, got peft_type {kind!r}")
    config = GravityLoraConfig.from_peft_type(**values)
    config.inference_mode = True
    return config


def _settings(where: str, config: GravityLoraConfig) -> GravityConfig:
    if config.gravity is None:
        raise ValueError(
            f"{where}: expected gravity settings in {_CONFIG_NAME}, found none: an ordinary LoRA "
            "adapter. Load it with peft.PeftModel.from_pretrained"
        )
    return GravityConfig.from_dict(config.gravity)


def _check_tensors(
    where: str, model: PreTrainedModel, settings: GravityConfig, present: set[str]
) -> None:
    sites = select_sites(find_attention_sites(model), settings)
    expected = [f"base_model.model.{site.name}.gravity.mass_log" for site in sites]
    missing = [name for name in expected if name not in present]
    if missing:
        raise ValueError(
            f"{where}: expected masses for every converted layer, {len(missing)} are missing, such "
            f"as {missing[0]}. The adapter was saved without modules_to_save=['gravity'], or "
            "belongs to another base"
        )


def _fill(model: PreTrainedModel, weights: dict[str, torch.Tensor]) -> None:
    # The base gets the adapter's masses too, so that disabling the adapter leaves a sound model.
    with torch.no_grad():
        for name, module in gravity_modules(model).items():
            for key, tensor in module.state_dict().items():
                tensor.copy_(weights[f"base_model.model.{name}.gravity.{key}"])


def _check_base(model: nn.Module, adapter: GravityLoraConfig) -> None:
    """Raise unless `model` is patched as `adapter` asks."""
    if adapter.gravity is None:
        return
    settings = GravityConfig.from_dict(adapter.gravity)
    parts = gravity_modules(model).values()
    patched = settings_of(model) or next((part.config for part in parts), None)
    if patched is None:
        raise RuntimeError(
            f"gravity adapter: expected a patched base, got {type(model).__name__} with its own "
            "attention. Use gravity_hf.load_gravity_adapter(model, folder), which patches it, or "
            "load_gravity_model(folder), which loads it, too"
        )
    if patched != settings:
        raise ValueError(
            f"gravity adapter: expected a base patched with {settings}, got {patched}. Use "
            "gravity_hf.load_gravity_adapter(model, folder) on an unpatched base"
        )


def _register_with_peft() -> None:
    """Let peft read gravity adapters, and ask before it puts one on a model.

    peft's own registration takes only names of its own list. The question stands in the one method
    through which every tuner, a mixed one and transformers' `load_adapter` included, changes a
    model: it comes before the first change.
    """
    PEFT_TYPE_TO_CONFIG_MAPPING[GRAVITY_LORA] = GravityLoraConfig
    inject = BaseTuner.inject_adapter

    @functools.wraps(inject)
    def checked(
        self: BaseTuner, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        config = self.peft_config[adapter_name]
        if isinstance(config, GravityLoraConfig):
            _check_base(model, config)
        inject(self, model, adapter_name, *args, **kwargs)

    BaseTuner.inject_adapter = checked


def _is_gravity(model: PeftModel) -> bool:
    return any(getattr(adapter, "gravity", None) for adapter in model.peft_config.values())


_register_with_peft()
route_adapters(PeftModel, _is_gravity)
