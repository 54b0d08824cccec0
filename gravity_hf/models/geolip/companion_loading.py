"""Which host a companion was made for, whether a given one is it, and how it is loaded."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel

from .companion_hosts import (
    blocks_of,
    encoder_of,
    has_head,
    is_causal_host,
    layer_index,
    layers_of,
    prefix_tokens_of,
    special_ids_of,
    width_of,
)
from .configuration_companion import GeolipCompanionConfig
from .configuration_geolip import GeolipConfig
from .places import lasting_name

# Of what `from_pretrained` is given, what finds a repository or folder, and what is of the host as
# well.
_HUB = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")
_OF_CONFIG = ("cache_dir", "force_download", "local_files_only", "token", "trust_remote_code")
_OF_HOST = (*_OF_CONFIG, "dtype", "device_map")
_NEW = "Make a new companion: GeolipCompanion.from_host(host)"


def config_beside(
    host: PreTrainedModel,
    geolip: str | GeolipConfig | None,
    *,
    causal: bool,
    train_host: bool,
    tokenizer: Any,
    special_token_ids: Iterable[int] | None,
    **options: Any,
) -> GeolipCompanionConfig:
    """Settings of a new companion; arguments are those of `GeolipCompanion.from_host`."""
    encoder_of(host)
    if isinstance(geolip, GeolipConfig):
        settings = copy.deepcopy(geolip)
    else:
        width = width_of(host.config)
        settings = GeolipConfig.from_preset(geolip or "base", patch_dim=width, is_causal=causal)
    ids = special_token_ids if tokenizer is None else special_ids_of(tokenizer)
    return GeolipCompanionConfig(
        geolip=settings,
        host_name_or_path=lasting_name(host.name_or_path),
        host_model_type=host.config.model_type,
        host_config=host.config.to_dict() if train_host else None,
        causal=causal,
        train_host=train_host,
        special_token_ids=None if ids is None else sorted(int(i) for i in ids),
        prefix_tokens=prefix_tokens_of(host),
        **options,
    )


def config_of(where: Any, options: dict[str, Any]) -> GeolipCompanionConfig:
    """The config of a companion that `from_pretrained(where, **options)` is to load."""
    given = options.get("config")
    if isinstance(given, GeolipCompanionConfig):
        return given
    hub = {name: options[name] for name in _HUB if name in options}
    return GeolipCompanionConfig.from_pretrained(where if given is None else given, **hub)


def checked_host(config: GeolipCompanionConfig, host: PreTrainedModel) -> PreTrainedModel:
    """`host`, or its encoder, if the companion can stand beside it.

    Raises:
        TypeError: no transformers model.
        ValueError: another type or width; a causal host without causal=True; no way to write.
    """
    encoder = encoder_of(host)
    _check_config(config, host.config)
    if is_causal_host(encoder) and not config.causal:
        raise ValueError(
            f"host: expected one whose tokens see each other both ways, got {type(host).__name__}, "
            "which is causal: a companion that looks both ways would show tokens what comes after "
            "them. Give causal=True, and its spectral layers are causal, too"
        )
    if config.train_host:
        _check_trained(host)
    if config.write != "residual":
        return encoder
    if layer_index(host.config, config.read_layer) < layers_of(host.config):
        blocks_of(encoder)
    elif has_head(encoder):
        raise ValueError(
            "host: expected one without a head beside write='residual' at its last layer, got "
            f"{type(host).__name__}, whose head would not see what is written. Give "
            "host.base_model, or an inner read_layer"
        )
    return encoder


def check_before_loading(
    config: GeolipCompanionConfig, host: PreTrainedModel | None, options: dict[str, Any]
) -> None:
    """Raise unless `host`, or the one that is named, is what the companion was made beside.

    Args:
        options: of the companion's `from_pretrained`; only the config of a named host is read.

    Raises:
        TypeError, ValueError: as `checked_host`; or no host where one is needed, or one where the
            companion has its own.
        OSError: nothing lies under the name.
    """
    if config.train_host:
        if host is not None:
            raise ValueError(
                "host: expected none beside a companion with train_host, which holds its own, got "
                f"{type(host).__name__}. Leave it out"
            )
        return
    if host is not None:
        checked_host(config, host)
        return
    if config.host_name_or_path is None:
        raise ValueError(
            "GeolipCompanion.from_pretrained: expected a host, since the companion was made beside "
            f"a model without a name, of type {config.host_model_type!r}, got none. Give host=model"
        )
    shared = {name: options[name] for name in _OF_CONFIG if name in options}
    try:
        named = AutoConfig.from_pretrained(**_named(config), **shared)
    except OSError as error:
        raise OSError(
            "GeolipCompanion.from_pretrained: expected to find the host that the companion was "
            f"made beside, {config.host_name_or_path!r}. If it is somewhere else, give host=model: "
            f"{error}"
        ) from error
    _check_config(config, named)


def host_of(config: GeolipCompanionConfig, options: dict[str, Any]) -> PreTrainedModel:
    """The host that a companion names; `options` are those of the companion's `from_pretrained`."""
    shared = {name: options[name] for name in _OF_HOST if name in options}
    return AutoModel.from_pretrained(**_named(config), **shared)


def named_host(name: str, revision: str | None) -> PreTrainedModel:
    return AutoModel.from_pretrained(name, revision=revision or "main")


def new_host(config: GeolipCompanionConfig) -> PreTrainedModel:
    """A host as `config.host_config` has it, with new weights."""
    values = dict(config.host_config or {})
    return AutoModel.from_config(AutoConfig.for_model(values.pop("model_type"), **values))


def _named(config: GeolipCompanionConfig) -> dict[str, Any]:
    revision = config.host_revision or "main"
    return {"pretrained_model_name_or_path": config.host_name_or_path, "revision": revision}


def _check_config(config: GeolipCompanionConfig, host: PreTrainedConfig) -> None:
    kind, width = config.host_model_type, config.hidden_size
    if kind is not None and host.model_type != kind:
        raise ValueError(
            f"host: expected one of type {kind!r}, which this companion was made beside, got "
            f"{host.model_type!r}. {_NEW}"
        )
    if width_of(host) != width:
        raise ValueError(
            f"host: expected hidden states of {width} dimensions, got {width_of(host)}. {_NEW}"
        )
    layer_index(host, config.read_layer)


def _check_trained(host: PreTrainedModel) -> None:
    """A host that lies in the companion's files is made by AutoModel when these are loaded."""
    made = AutoModel._model_mapping.get(type(host.config), None)
    if made is not type(host) or host.config.is_encoder_decoder:
        raise ValueError(
            f"host: expected what AutoModel makes of {host.config.model_type!r}, and no "
            f"encoder-decoder, beside train_host=True, got {type(host).__name__}. Give a host "
            "without a head, or train_host=False"
        )
