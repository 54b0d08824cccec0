"""Names that a config of one of the models takes, and what it says to others."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

_logger = logging.getLogger(__name__)

# A published name of what is a choice of two here.
FRACTAL = "use_fractal_positions"
# What transformers takes, or writes into a folder, beside the fields and properties of its configs.
_OF_TRANSFORMERS = {
    *("attn_implementation", "experts_implementation", "torch_dtype", "per_layer_config"),
    *("quantization_config", "auto_map", "custom_pipelines", "tokenizer_class", "adapters"),
    *("task_specific_params", "finetuning_task", "distributed_config", "tie_last_hidden_states"),
}


def settle_names(config: PreTrainedConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """`given` without `use_fractal_positions`, which is entered as `position_type`.

    What a saved config holds beyond the settings is kept, with a warning: other software writes
    there.

    Args:
        config: its fields are set.
        given: all else that it was constructed with.

    Raises:
        ValueError: an unknown name, or two names of one setting with two values.
    """
    left = dict(given)
    name = type(config).__name__
    known = {*(f.name for f in fields(config)), *config.attribute_map}
    if "position_type" in known:
        known.add(FRACTAL)
    unknown = [key for key in left if key not in known and not _is_of_transformers(key)]
    if unknown and config.transformers_version is None:
        near = difflib.get_close_matches(unknown[0], sorted(known))
        hint = f"Did you mean {' or '.join(near)}?" if near else f"See help({name})"
        raise ValueError(f"{name}: expected names of its settings, got {unknown}. {hint}")
    if unknown:
        _logger.warning("%s: the saved config holds unknown settings: %s", name, unknown)
    own = {key: config.attribute_map[key] for key in left if key in config.attribute_map}
    values = {alias: left[alias] for alias in own}
    fractal = left.pop(FRACTAL, None) if FRACTAL in known else None
    if fractal is not None:
        own[FRACTAL], values[FRACTAL] = "position_type", "fractal" if fractal else "curved"
    defaults = {f.name: f.default for f in fields(config) if f.default is not MISSING}
    for alias, field in own.items():
        now = getattr(config, field)
        if now != values[alias] and now != defaults.get(field):
            raise ValueError(
                f"{name}.{field}: expected one value, got {now!r}, and by its name {alias} "
                f"{values[alias]!r}. Leave one of them out"
            )
    if fractal is not None:
        config.position_type = values[FRACTAL]
    return left


def by_field_names(given: Mapping[str, Any], aliases: Mapping[str, str]) -> dict[str, Any]:
    """Settings by the names of fields where some have published ones.

    Raises:
        ValueError: two names of one setting.
    """
    named: dict[str, Any] = {}
    for key, value in given.items():
        field = aliases.get(key, key)
        if key == FRACTAL:
            field, value = "position_type", "fractal" if value else "curved"
        if field in named:
            raise ValueError(f"{field}: expected one value, got two, one as {key}. Leave one out")
        named[field] = value
    return named


def _is_of_transformers(key: str) -> bool:
    return (
        key.startswith("_")
        or key in _OF_TRANSFORMERS
        or hasattr(PreTrainedConfig, key)
        or key in GenerationConfig._get_default_generation_params()
    )
