"""`Gravity<Host>` classes, made on demand, and their place in transformers' Auto classes.

A gravity checkpoint carries its own `model_type`, so that software which does not know gravity
refuses it. Here that type is turned into classes again: `gravity_qwen2` is `Qwen2Config` with
another name, `GravityQwen2ForCausalLM` is `Qwen2ForCausalLM` with gravity modules attached.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.models.auto import (
    feature_extraction_auto,
    image_processing_auto,
    modeling_auto,
    processing_auto,
    tokenization_auto,
)
from transformers.models.auto.auto_factory import _LazyAutoMapping

from ..config import GravityConfig
from ..layers.parameters import GravityParameters
from .attention import register
from .autos import MODEL_TYPE_PREFIX
from .carrier import is_served
from .guards import (
    name_in_export,
    name_weights_in_export,
    refuse_other_attention,
    refuse_other_names,
    watch,
    without_weights_name,
)
from .implementations import name_gravity
from .publishing import modification_times, publish, publish_saved
from .remote_code import REMOTE_CODE_MODULE, copy_remote_code
from .sites import AttentionSite, find_attention_sites, memoised
from .tensor_parallel import plan_heads

# `GravityHost` is mixed into PreTrainedModels; it must not be one itself, or it would carry the
# base's defaults in front of the host's. Type checkers are told that it may be anything.
_Base: Any = object

CLASS_PREFIX = "Gravity"
_LOADING_INFO = "_gravity_loading_info"

register()


def settings_of(model: nn.Module) -> GravityConfig | None:
    """The settings of a patched model; None for any other."""
    return _read_settings(model.config) if isinstance(model, GravityHost) else None


def select_sites(sites: list[AttentionSite], settings: GravityConfig) -> list[AttentionSite]:
    """The attention modules that `settings.layers` asks for."""
    if settings.layers is None:
        return sites
    beyond = [i for i in settings.layers if i >= len(sites)]
    if beyond:
        raise ValueError(
            f"GravityConfig.layers: expected indices below {len(sites)} (the model's attention "
            f"modules, from {sites[0].name} to {sites[-1].name}), got {beyond}"
        )
    return [sites[i] for i in settings.layers]


class _Depth(threading.local):
    value = 0


_depth = _Depth()


@contextmanager
def _building() -> Iterator[bool]:
    """While a gravity model is built; whether it is a part of one that is being built already."""
    _depth.value += 1
    try:
        yield _depth.value > 1
    finally:
        _depth.value -= 1


class GravityHostConfig:
    """First base of every gravity config: adds `auto_map`, which makes exports load anywhere, and
    what makes the host's own class refuse them."""

    def to_dict(self) -> dict[str, Any]:
        output = super().to_dict()  # type: ignore[misc]
        # In a graph it is asked for its keys only, on every forward of an encoder-decoder.
        if not torch.compiler.is_compiling() and is_native(host_of(type(self))):
            output["auto_map"] = _auto_map(type(self))
            name_in_export(output, self)
        return output

    def to_diff_dict(self) -> dict[str, Any]:
        # What `config.json` is written from, and nothing else is: a config in memory has no such
        # name, and `from_dict` takes it out again.
        output = super().to_diff_dict()  # type: ignore[misc]
        if is_native(host_of(type(self))):
            name_weights_in_export(output, self)
        return output

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        return super().from_dict(without_weights_name(config_dict), **kwargs)  # type: ignore[misc]

    @classmethod
    def from_json_file(cls, json_file: str | os.PathLike) -> Any:
        return cls.from_pretrained(json_file)  # type: ignore[attr-defined]


class GravityHost(_Base):
    """First base of every gravity model: attaches the gravity modules and guards load and save."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        settings = _read_settings(config)
        if settings is None:
            raise ValueError(
                f"{type(self).__name__}: expected config.gravity, the gravity settings, got none. "
                "Load the host's own class and call patch_with_gravity(model)"
            )
        with _building() as is_part:
            if not is_part:
                refuse_other_names(type(self).__name__, config)
                # Not ours yet: towers with a class per attention name have none for this one.
                config._attn_implementation = None
            super().__init__(config, *args, **kwargs)
        name_gravity(self)
        sites = select_sites(find_attention_sites(self), settings)
        for site in sites:
            site.module.gravity = make_child(site, settings)
            watch(site.module)
        plan_heads(self, sites)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a checkpoint without all of its gravity tensors is refused, because
        parameters missing from a checkpoint would be uninitialised memory."""
        want_info = kwargs.pop("output_loading_info", False)
        if want_info or not _loads_its_own_way(host_of(cls)):
            model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        else:
            model = super().from_pretrained(*args, **kwargs)
            info = model.__dict__.pop(_LOADING_INFO, None)
            if info is None:
                raise RuntimeError(
                    f"{cls.__name__}: expected to be told which tensors the checkpoint lacks, was "
                    "not, so that garbage could not be noticed. Pass output_loading_info=True"
                )
        missing = sorted(key for key in info["missing_keys"] if ".gravity." in key)
        if missing:
            raise ValueError(
                f"{cls.__name__}: expected gravity tensors for every converted layer, "
                f"{len(missing)} are missing, such as {missing[0]}. The checkpoint is incomplete "
                "or its config.gravity belongs to another one"
            )
        return (model, info) if want_info else model

    @classmethod
    def _finalize_model_loading(cls, model: Any, *args: Any, **kwargs: Any) -> Any:
        found = super()._finalize_model_loading(model, *args, **kwargs)
        if _loads_its_own_way(host_of(cls)):
            model.__dict__[_LOADING_INFO] = {"missing_keys": found.missing_keys}
        return found

    @classmethod
    def is_custom_code(cls) -> bool:
        """transformers leaves buffers of custom code uninitialised that a host initialises."""
        return host_of(cls).is_custom_code()  # type: ignore[attr-defined]

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # transformers looks for the answer in the source of the class's own file.
        return host_of(cls)._can_set_experts_implementation()  # type: ignore[attr-defined]

    def set_attn_implementation(self, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
        refuse_other_attention(type(self).__name__, attn_implementation)

    def init_continuous_batching(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, inside `gravity_serving(model)`."""
        if not is_served(self.config):
            raise ValueError(
                f"{type(self).__name__}: expected continuous batching inside `with "
                "gravity_serving(model):`, which lets transformers run it with gravity, got a call "
                "outside. from gravity_hf import gravity_serving"
            )
        return super().init_continuous_batching(*args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, *args: Any, **kwargs: Any) -> None:
        """As in transformers, plus `modeling_gravity.py`, so that the folder loads without
        gravity_hf through `trust_remote_code=True`. With `push_to_hub` what was written is pushed
        as `push_to_hub` does it."""
        host = host_of(type(self))
        if not is_native(host):
            raise ValueError(
                f"{host.__name__} is not part of transformers, so an export of it could not be "
                "loaded again; expected a host from transformers. Save the unpatched host and its "
                "gravity tensors instead"
            )
        hub = _take_hub_arguments(kwargs)
        before = modification_times(save_directory)
        writes = self.should_save_on_this_rank(kwargs.get("is_main_process", True))
        # Under tensor parallelism every process saves, and one writes.
        if writes:
            copy_remote_code(save_directory)
        super().save_pretrained(save_directory, *args, **kwargs)
        if hub is not None and writes:
            publish_saved(self, save_directory, before, **hub)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        commit_description: str | None = None,
        private: bool | None = None,
        token: bool | str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        max_shard_size: int | str | None = "50GB",
        tags: list[str] | str | None = None,
    ) -> Any:
        """As in transformers, but whole and in one commit: tokenizer, `modeling_gravity.py`,
        figures and the card of a gravity model go with the weights, and weights of an earlier
        model go away. More choices: `gravity_hf.push_gravity_model`.

        Returns:
            huggingface_hub's `CommitInfo`.
        """
        given = [tags] if isinstance(tags, str) else list(tags or ())
        own = list(getattr(self, "model_tags", None) or ())
        return publish(
            self,
            repo_id,
            commit_message=commit_message,
            commit_description=commit_description,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            max_shard_size=max_shard_size,
            tags=[*own, *(tag for tag in given if tag not in own)],
        )


# Of `save_pretrained`'s arguments, those that are about the Hub.
_HUB_ARGUMENTS = ["repo_id", "commit_message", "commit_description", "private", "revision"]
_HUB_ARGUMENTS += ["create_pr", "tags"]


def _take_hub_arguments(kwargs: dict[str, Any]) -> dict[str, Any] | None:
    """Takes `push_to_hub` and what belongs to it out of `kwargs`; None where nothing is pushed."""
    if not kwargs.pop("push_to_hub", False):
        return None
    hub = {name: kwargs.pop(name) for name in _HUB_ARGUMENTS if name in kwargs}
    return {**hub, "token": kwargs.get("token")}


def _loads_its_own_way(host: Any) -> bool:
    """Whether a host has a `from_pretrained` of its own, which may give no loading info back."""
    own, general = host.from_pretrained.__func__, PreTrainedModel.from_pretrained.__func__
    return own is not general


def make_child(
    site: AttentionSite, settings: GravityConfig, device: Any = None
) -> GravityParameters:
    """The `gravity` child for one attention module."""
    child = GravityParameters(settings, site.query_heads, site.key_value_heads, device=device)
    return child.train(site.module.training)


def gravity_modules(model: nn.Module) -> dict[str, GravityParameters]:
    """The gravity modules in force, by the name of their attention module. Under peft a `gravity`
    child is a wrapper around several copies: the active one counts."""
    found = {}
    for name, module in model.named_modules():
        child = module._modules.get("gravity")
        if child is None or not hasattr(child, "mass_log"):
            continue
        copies = (m for m in child.modules() if isinstance(m, GravityParameters))
        found[name] = next(m for m in copies if m.mass_log is child.mass_log)
    return found


def host_of(gravity_class: type) -> type:
    """The host's class, of a gravity model or config class."""
    # Counted from our own base: `fully_shard` puts classes of its own in front of a model's.
    order = gravity_class.__mro__
    base = GravityHost if issubclass(gravity_class, GravityHost) else GravityHostConfig
    return order[order.index(base) + 1]


def is_native(host: type) -> bool:
    """Whether transformers itself defines `host`: only then can its name bring it back."""
    return getattr(transformers, host.__name__, None) is host


@memoised
def gravity_config_class(host: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    """`Gravity<Host>Config`, registered with every Auto class that knows the host."""
    model_type = MODEL_TYPE_PREFIX + host.model_type
    body = {"model_type": model_type, "__module__": __name__}
    cls = type(CLASS_PREFIX + host.__name__, (GravityHostConfig, host), body)
    _inherit_weight_conversions(host.model_type, model_type)
    for mapping in _auto_mappings():
        value = _classes_of(mapping, host)
        if value is not None:
            models = value if isinstance(value, tuple) else (value,)
            if all(isinstance(m, type) and issubclass(m, PreTrainedModel) for m in models):
                # A decision model is built around its host, and has a config of another kind.
                decides = mapping is getattr(modeling_auto, "MODEL_FOR_DECISION_MAPPING", None)
                if decides and any(m.config_class is not host for m in models):
                    continue
                ours = tuple(gravity_model_class(model, cls) for model in models)
                value = ours if isinstance(value, tuple) else ours[0]
                _list_names(mapping, model_type, value)
            mapping.register(cls, value, exist_ok=True)
    return cls


def _classes_of(mapping: _LazyAutoMapping, host: type[PreTrainedConfig]) -> Any:
    """What an Auto class knows of `host`; None for nothing, or for a class that it names and that
    transformers does not export."""
    try:
        return mapping[host]
    except (KeyError, ValueError):
        return None


def _list_names(
    mapping: _LazyAutoMapping, model_type: str, models: type | tuple[type, ...]
) -> None:
    # Pipelines, Trainer's label smoothing and the server look a model up by the name of its class
    # or type in these tables, and treat one that is not there as unsupported, or unshifted.
    names = tuple(m.__name__ for m in models) if isinstance(models, tuple) else models.__name__
    mapping._model_mapping[model_type] = names


@memoised
def gravity_model_class(
    host: type[PreTrainedModel], config_class: type[PreTrainedConfig]
) -> type[PreTrainedModel]:
    """`Gravity<Host>`: the host's class with gravity modules attached at construction."""
    body = {
        "config_class": config_class,
        "__module__": __name__,
        # Masses stay float32 in half-precision loads; see GravityParameters.
        "_keep_in_fp32_modules_strict": {
            *(getattr(host, "_keep_in_fp32_modules_strict", None) or ()),
            "gravity",
        },
    }
    name = CLASS_PREFIX + host.__name__
    _inherit_weight_conversions(host.__name__, name)
    return type(name, (GravityHost, host), body)


def __getattr__(name: str) -> type:
    """Classes by name, so that pickling and `AutoModel` find them here."""
    host = getattr(transformers, name.removeprefix(CLASS_PREFIX), None)
    if name.startswith(CLASS_PREFIX) and isinstance(host, type):
        if issubclass(host, PreTrainedConfig):
            return gravity_config_class(host)
        if issubclass(host, PreTrainedModel):
            config_class = gravity_config_class(host.config_class)  # type: ignore[attr-defined]
            return gravity_model_class(host, config_class)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _read_settings(config: PreTrainedConfig) -> GravityConfig | None:
    block = getattr(config, "gravity", None)
    return None if block is None else GravityConfig.from_dict(block)


def _inherit_weight_conversions(host: str, name: str) -> None:
    # Hosts whose checkpoints are renamed or fused on load save in the published layout too; the
    # gravity type needs the same table, or its own files would not fit it.
    conversions = get_checkpoint_conversion_mapping(host)
    if conversions is not None:
        register_checkpoint_conversion_mapping(name, conversions, overwrite=True)


@memoised
def _auto_mappings() -> tuple[_LazyAutoMapping, ...]:
    modules = (
        modeling_auto,
        tokenization_auto,
        image_processing_auto,
        feature_extraction_auto,
        processing_auto,
    )
    found = (value for module in modules for value in vars(module).values())
    unique = {id(value): value for value in found if isinstance(value, _LazyAutoMapping)}
    return tuple(unique.values())


def _auto_map(config_class: type) -> dict[str, str]:
    entries = {"AutoConfig": f"{REMOTE_CODE_MODULE}.{config_class.__name__}"}
    for name, auto in vars(modeling_auto).items():
        mapping = getattr(auto, "_model_mapping", None)
        if name.startswith("Auto") and mapping is not None and config_class in mapping:
            model_class = mapping[config_class]
            if isinstance(model_class, type):
                entries[name] = f"{REMOTE_CODE_MODULE}.{model_class.__name__}"
    return entries
