"""Rules that make a configuration tiny: a number's name says what it counts.

A default instance of a configuration holds everything its class derives (sub-configurations,
layer kinds, ...). `Shrinker` reads it and makes a tiny sibling. All widths become one width and
all head counts one count, so that parts which must agree still do.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from integration.sweep.kept_layers import KeptLayers, default_depth, read
from integration.sweep.limits import HEAD_WIDTH, HEADS, VOCABULARY, smaller_list, smaller_number
from integration.sweep.overrides import SECTIONED
from transformers import AutoConfig, PreTrainedConfig, ResNetConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

Arguments = dict[str, Any]
_TOKEN = r"(.*)_(token_(id|index)|patch_id)"
_PLACEHOLDER = r"(image|video|audio)_token_(id|index)"
_COMMON = {field.name for field in dataclasses.fields(PreTrainedConfig)}
_TOWERS = ("vision_config", "audio_config")
_IMAGE, _PATCH = 32, 8


class Shrinker:
    """Makes one configuration tiny, with its parts, which share special token ids.

    Args:
        overrides: What single types need: model type to arguments. A dotted name reaches into a
            part; a dict at a part's name builds that part.
    """

    def __init__(self, overrides: Mapping[str, Arguments]) -> None:
        self._overrides = overrides
        self._tokens = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 1, "sep": 2, "cls": 1}

    def tiny(self, config: PreTrainedConfig, extra: Arguments | None = None) -> PreTrainedConfig:
        """A tiny sibling of `config`, a default instance, which is not changed."""
        if config.model_type == "timm_backbone":
            config = _resnet_instead(config)
        return type(config)(**self._arguments(config, extra or {}))

    def _arguments(self, config: PreTrainedConfig, extra: Arguments) -> Arguments:
        own, inner = _split({**self._overrides.get(config.model_type, {}), **extra})
        kept = KeptLayers.of(config)
        out: Arguments = {}
        for field in dataclasses.fields(config):
            value = read(config, field.name)
            if field.name in _COMMON or isinstance(own.get(field.name), dict):
                continue
            if isinstance(value, PreTrainedConfig):
                extra = {**_unnamed(config, field.name), **inner.get(field.name, {})}
                out[field.name] = self.tiny(value, extra)
            elif _is_token(field.name, value):
                out[field.name] = self._token(field.name, value)
            elif field.default is not None or (kept and kept.is_per_layer(field.name, value)):
                new = _smaller(config, field.name, value, kept)
                out.update({} if new == field.default else {field.name: new})
        out.update(kept.arguments(config) if kept else {})
        for values in out.get("per_layer_config", {}).values():
            values.update(_single_layer(config, values))
        out.update({**_stages(config, kept), **_images(config), **_missing(config, own)})
        out.update(_rotary(config))
        return {**out, **self._chosen(config, own, inner)}

    def _chosen(
        self, config: PreTrainedConfig, own: Arguments, inner: dict[str, Arguments]
    ) -> Arguments:
        """The overrides, and parts that are absent by default but belong to the model."""
        out = dict(own)
        for name, part_class in config.sub_configs.items():
            chosen = own.get(name)
            if isinstance(chosen, dict):
                part = {k: v for k, v in chosen.items() if k != "model_type"}
                if "model_type" in chosen:
                    part_class = CONFIG_MAPPING[chosen["model_type"]]
                out[name] = self.tiny(part_class(**part), inner.get(name))
            elif part_class is AutoConfig or name not in _TOWERS:
                continue  # nothing says which type it would have
            elif name not in own and read(config, name) is None:
                out[name] = self.tiny(part_class(), inner.get(name))
        return out

    def _token(self, name: str, value: object) -> object:
        stem = re.sub(_TOKEN, r"\1", name)
        number = self._tokens.setdefault(stem, len(self._tokens))
        return [number] if isinstance(value, (list, tuple)) else number


def _unnamed(config: PreTrainedConfig, name: str) -> Arguments:
    """What a composite gives a part under names that the class of the part does not declare."""
    spec = getattr(config, "sub_configs_defaults", {}).get(name)
    part = read(config, name)
    known = _fields(part) | {"out_indices", "out_features"}
    given = getattr(spec, "init_kwargs", None) or {}
    return {
        key: smaller_number(part, key, value) if type(value) is int else value
        for key, value in given.items()
        if key not in known
    }


def _split(overrides: Arguments) -> tuple[Arguments, dict[str, Arguments]]:
    own: Arguments = {}
    inner: dict[str, Arguments] = {}
    for name, value in overrides.items():
        head, _, rest = name.partition(".")
        if rest:
            inner.setdefault(head, {})[rest] = value
        else:
            own[head] = value
    return own, inner


def _is_token(name: str, value: object) -> bool:
    if value is None:
        return re.fullmatch(_PLACEHOLDER, name) is not None
    number = value[0] if isinstance(value, (list, tuple)) and value else value
    return type(number) is int and re.fullmatch(_TOKEN, name) is not None


def _smaller(config: PreTrainedConfig, name: str, value: Any, kept: KeptLayers | None) -> Any:
    """The value of the field `name` in a tiny configuration."""
    if re.fullmatch(r"initializer_range|init_std", name):
        return 0.2
    if type(value) is int:
        return smaller_number(config, name, value)
    if isinstance(value, (list, tuple)) and value:
        chosen = kept.select(name, list(value)) if kept else list(value)
        return type(value)(smaller_list(config, name, chosen))
    return value


def _single_layer(config: PreTrainedConfig, values: Arguments) -> Arguments:
    """What one layer has of its own, still different from the rest."""
    out: Arguments = {}
    for name, value in values.items():
        if type(value) is int:
            number = smaller_number(config, name, value)
            common = read(config, name)
            same = common not in (None, value) and number == smaller_number(config, name, common)
            out[name] = 2 * number if same and value > common else number
    return out


def _stages(config: PreTrainedConfig, kept: KeptLayers | None) -> Arguments:
    """Features that a backbone hands out, where its user asked for more than the last."""
    names = getattr(config, "stage_names", None)
    if not names or "out_indices" in _fields(config):
        return {}
    picks = [i % len(names) for i in config.out_indices or []]
    if picks == [len(names) - 1]:
        return {}
    if kept is not None and len(names) == (default_depth(config) or 0) + 1:
        picks = [kept.layers.index(i - 1) + 1 if i else 0 for i in picks]
    return {"out_indices": picks}


def _images(config: PreTrainedConfig) -> Arguments:
    out: Arguments = {}
    for name, largest in (("image_size", _IMAGE), ("patch_size", _PATCH)):
        value = read(config, name)
        if name not in _fields(config):
            continue
        if isinstance(value, int) and value > largest:
            out[name] = largest
        elif isinstance(value, (list, tuple)) and value and max(value) > largest:
            out[name] = type(value)(min(v, largest) for v in value)
    if "image_grid_pinpoints" in _fields(config):
        out["image_grid_pinpoints"] = [[2 * _IMAGE, 2 * _IMAGE]]
    return out


def _missing(config: PreTrainedConfig, own: Arguments) -> Arguments:
    """What some classes leave undefined although their models need it."""
    wanted = {"vocab_size": VOCABULARY}
    if "vocab_size" in _fields(config):
        wanted["pad_token_id"] = 0
    if read(config, "num_attention_heads"):
        wanted.update(head_dim=HEAD_WIDTH, num_key_value_heads=HEADS)
    return {
        name: value
        for name, value in wanted.items()
        if name in _fields(config) and name not in own and read(config, name) is None
    }


def _rotary(config: PreTrainedConfig) -> Arguments:
    """Sections of a multi-axis rotary embedding must add up to half of the (tiny) head."""
    rope = read(config, "rope_parameters")
    if not isinstance(rope, dict):
        return {}
    sections = rope.get("mrope_section") or ([1, 1, 1] if config.model_type in SECTIONED else [])
    if not sections:
        return {}
    rotated = min(read(config, "qk_rope_head_dim") or HEAD_WIDTH, 8)
    if not read(config, "qk_rope_head_dim"):
        rotated = int(HEAD_WIDTH * (rope.get("partial_rotary_factor") or 1.0))
    rest = rotated // 2 // len(sections)
    first = rotated // 2 - rest * (len(sections) - 1)
    new = [first] + [rest] * (len(sections) - 1)
    return {"rope_parameters": {**rope, "mrope_section": new}}


def _resnet_instead(config: PreTrainedConfig) -> PreTrainedConfig:
    """A convolutional backbone without timm that hands out as many features."""
    picks = getattr(config, "out_indices", None) or [-1]
    return ResNetConfig(out_indices=[i % 5 for i in picks])


def _fields(config: PreTrainedConfig) -> set[str]:
    return {field.name for field in dataclasses.fields(config)}
