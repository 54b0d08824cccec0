"""Freshly initialised models: any registered architecture, our own ones, hosts under gravity."""

from __future__ import annotations

import json
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..config import GravityConfig
from ..integration.calibration import calibrate
from ..integration.own_models import is_own_config
from ..integration.patching import patch_with_gravity
from .pretrain_arguments import PretrainArguments
from .streams import RandomWindows

_CALIBRATION_BATCHES = 4
_CALIBRATION_ROWS = 8


def new_model(arguments: PretrainArguments, vocabulary: int, seed: int) -> PreTrainedModel:
    """A freshly initialised model, reproducible by `seed`.

    A model that is gravity by construction is so from the beginning, or is its dot-product twin;
    the attention of any other is still its own. See `start_under_gravity`.

    Raises:
        ValueError: no such architecture or preset, a setting that it does not have, or settings
            that do not go together.
    """
    config = config_of(arguments, vocabulary)
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)


def config_of(arguments: PretrainArguments, vocabulary: int) -> PreTrainedConfig:
    """The config of `new_model`, with its errors: a check that costs nothing."""
    sizes = {"vocab_size": vocabulary, **parse_overrides(arguments.overrides)}
    known = _known_config(arguments.architecture)
    unknown = sorted(name for name in sizes if not hasattr(known, name))
    if unknown:
        raise ValueError(
            f"--overrides: expected settings of {type(known).__name__}, got {unknown}, which it "
            "does not have"
        )
    if is_own_config(known):
        sizes = _own_settings(known, arguments, sizes)
    # The default tokens of published models may lie outside a small vocabulary.
    outside = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    settings = {**outside, **sizes}
    try:
        if arguments.preset is None:
            return AutoConfig.for_model(arguments.architecture, **settings)
        return _from_preset(type(known), arguments, settings)
    except StrictDataclassError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"--overrides: expected settings that fit together: {reason}") from error


def start_under_gravity(
    model: PreTrainedModel, arguments: PretrainArguments, windows: RandomWindows
) -> None:
    """Patch a new model and set its masses and softenings from its own queries and keys.

    At random weights as in a trained model the closed form gives every head the temperature of the
    dot product that it replaces; Gravity-2's constants would start the heads near uniform.
    """
    settings = GravityConfig(
        law=arguments.law, mass_per=arguments.mass_per, implementation=arguments.implementation
    )
    patch_with_gravity(model, settings)
    batches = [
        {"input_ids": windows.__getitems__(list(range(start, start + _CALIBRATION_ROWS)))}
        for start in range(0, _CALIBRATION_BATCHES * _CALIBRATION_ROWS, _CALIBRATION_ROWS)
        if start + _CALIBRATION_ROWS <= len(windows)
    ]
    calibrate(model, batches, arguments.softness, arguments.distance, progress=False)


def parse_overrides(text: str) -> dict[str, Any]:
    """`"a=1,b=x"` or a JSON object as a dict; numbers and booleans are read as such."""
    text = text.strip()
    if text.startswith("{"):
        try:
            return json.loads(text)
        except ValueError as error:
            raise ValueError(
                f"--overrides: expected a JSON object or name=value, got {text!r} ({error})"
            ) from error
    values = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, equals, value = part.partition("=")
        if not equals:
            raise ValueError(f"--overrides: expected name=value, got {part!r}")
        try:
            values[name.strip()] = json.loads(value)
        except ValueError:
            # As Python writes them, too.
            values[name.strip()] = _WORDS.get(value.strip(), value.strip())
    return values


_WORDS = {"True": True, "False": False, "None": None}


def _known_config(architecture: str) -> PreTrainedConfig:
    try:
        return AutoConfig.for_model(architecture)
    except ValueError as error:
        raise ValueError(
            "--model: expected a model_type of this library or of transformers, such as ngt, lgt, "
            f"leanformer, qwen2 or gpt2, got {architecture!r}"
        ) from error


def _own_settings(
    config: PreTrainedConfig, arguments: PretrainArguments, sizes: dict[str, Any]
) -> dict[str, Any]:
    """The overrides of one of our own models, and what the other arguments say of it."""
    given = arguments.given_for_hosts()
    if given:
        raise ValueError(
            f"--{next(iter(given))}: expected only with a host that is patched, such as qwen2; "
            f"{arguments.architecture} is gravity by construction. What it has is set by "
            "--overrides, for instance law=force"
        )
    sizes = dict(sizes)
    if arguments.attention == "dot_product" and hasattr(config, "attention"):
        sizes.setdefault("attention", "dot_product")
        if sizes["attention"] != "dot_product":
            raise ValueError(
                "--attention: expected the attention of --overrides, "
                f"{sizes['attention']!r}, or none there, got 'dot_product'"
            )
    elif getattr(config, "attention", "gravity") != "gravity":
        sizes.setdefault("attention", "gravity")
    if arguments.implementation != "auto":
        sizes.setdefault("implementation", arguments.implementation)
    places = "max_position_embeddings"
    others = {name for name, target in config.attribute_map.items() if target == places}
    if not sizes.keys() & {places, *others}:
        sizes[places] = arguments.length
    return sizes


def _from_preset(
    kind: Any, arguments: PretrainArguments, settings: dict[str, Any]
) -> PreTrainedConfig:
    if not hasattr(kind, "from_preset"):
        raise ValueError(
            f"--preset: expected none, as {arguments.architecture} has no presets, got "
            f"{arguments.preset!r}. Say its sizes with --overrides"
        )
    return kind.from_preset(arguments.preset, **settings)
