"""The model that is exported: loaded anew from a folder, so that nobody else's is changed."""

from __future__ import annotations

import inspect
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ...config import GravityConfig
from ...integration.hosts import gravity_modules, settings_of
from ...integration.loading import load_gravity_model
from ...training.folders import WEIGHTS
from ..own_models import OwnSettings, is_own_config, is_own_model, own_settings

# Inputs of towers beside the text, by which a model is known to be multimodal.
_OTHER_TOWERS = ("pixel_values", "input_features", "input_values", "pixel_values_videos")


@dataclass(frozen=True)
class Source:
    """A gravity model in float32 on the CPU, in evaluation mode.

    Attributes:
        folder: where it was loaded from.
        model: the model; ours alone.
        kind: `"decoder"` (writes text with a cache), `"encoder"` (one pass over text),
            `"vision"` (one pass over images) or `"encoder-decoder"`.
        settings: its gravity settings: a patched host's, or those of a model of our own.
    """

    folder: Path
    model: PreTrainedModel
    kind: str
    settings: GravityConfig | OwnSettings

    @property
    def model_type(self) -> str:
        return self.model.config.model_type

    @property
    def metadata(self) -> dict[str, str]:
        """What every file says of the model in it, for formats that keep texts by name."""
        return {
            "model_type": self.model_type,
            "gravity": json.dumps(self.settings.to_dict()),
            "gravity_law": self.settings.law,
        }


def load_source(folder: Path) -> Source:
    """ValueError for a folder that is not an unquantised, merged gravity model of a known kind."""
    _require_model(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    # Without a method it is no quantisation, but the mark of a model that needs gravity.
    if (config.get("quantization_config") or {}).get("quant_method"):
        raise ValueError(
            f"export: expected float weights, {str(folder)!r} is quantised already. Export "
            "from the folder that it was made from"
        )
    return source_of(load_runnable(folder, dtype=torch.float32), folder)


def _require_model(folder: Path) -> None:
    """ValueError for a place that holds no weights of a whole model, by what it holds instead."""
    shown = str(folder)
    if not folder.is_dir():
        raise ValueError(
            f"export: expected the folder of a gravity model, {shown!r} is none. Check the "
            "spelling; a model on the Hub is downloaded first: hf download NAME --local-dir FOLDER"
        )
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"export: expected a whole model, got an adapter in {shown!r}. Merge it first: "
                "load_gravity_model(folder).merge_and_unload().save_pretrained(...)"
            )
        raise ValueError(
            f"export: expected the folder of a gravity model, {shown!r} has no config.json. Give "
            "the folder that save_pretrained wrote"
        )
    weights = [name for name in WEIGHTS if any(folder.glob(name))]
    if weights and WEIGHTS[0] not in weights:
        names = ", ".join(file.name for name in weights for file in folder.glob(name))
        raise ValueError(
            f"export: expected weights in safetensors, got a program ({names}) in {shown!r}. "
            "Export from the folder that it was made from"
        )


def source_of(model: PreTrainedModel, folder: Path) -> Source:
    settings = _settings(model)
    if settings is None:
        raise ValueError(
            f"export: expected a gravity model, got {type(model).__name__} with dot-product "
            "attention. Convert it first: patch_with_gravity(model), calibrate(model, ...)"
        )
    return Source(folder, model, kind_of(model), settings)


def _settings(model: nn.Module) -> GravityConfig | OwnSettings | None:
    if is_own_model(model):
        return own_settings(model.config)
    return settings_of(model)


def load_runnable(folder: Path, **options: Any) -> PreTrainedModel:
    """The model of a folder, run by the implementation that this machine has, whichever its
    settings name; a host's stay as they are in `model.config`."""
    model = load_gravity_model(folder, **options).eval()
    if is_own_config(model.config) and hasattr(model.config, "implementation"):
        model.config.implementation = "auto"
    for module in gravity_modules(model).values():
        module.config = replace(module.config, implementation="auto")
    return model


@contextmanager
def folder_of(model_or_folder: nn.Module | str | os.PathLike) -> Iterator[Path]:
    """The folder itself, or a temporary one with the model saved in it."""
    if not isinstance(model_or_folder, nn.Module):
        yield Path(model_or_folder).expanduser()
        return
    if hasattr(model_or_folder, "peft_config"):
        raise ValueError(
            "export: expected a merged model, got one with adapters. Merge them first: "
            "model.merge_and_unload()"
        )
    if _settings(model_or_folder) is None:
        raise ValueError(
            f"export: expected a gravity model, got {type(model_or_folder).__name__}. Convert it "
            "first: patch_with_gravity(model), calibrate(model, ...)"
        )
    with tempfile.TemporaryDirectory() as place:
        model_or_folder.save_pretrained(place)  # type: ignore[operator]
        yield Path(place)


def kind_of(model: PreTrainedModel) -> str:
    """The kind of a model; ValueError, by name, for one that no format is made for."""
    accepted = forward_arguments(model)
    if getattr(model.config, "is_encoder_decoder", False) and "decoder_input_ids" in accepted:
        return "encoder-decoder"
    main = model.main_input_name
    if main == "input_ids" and model.get_input_embeddings() is None:
        raise ValueError(
            f"export: expected a model that reads tokens, got {type(model).__name__} without a "
            "vocabulary, which takes inputs_embeds and has no export. Use it in transformers: "
            "model.save_pretrained(folder)"
        )
    if main == "pixel_values" and hasattr(model.config, "image_size"):
        return "vision"
    if main == "input_ids" and not accepted & set(_OTHER_TOWERS):
        # One that sees what comes later has no cache, whatever its class could do.
        looks_ahead = is_own_config(model.config) and not getattr(model.config, "is_causal", True)
        return "decoder" if model.can_generate() and not looks_ahead else "encoder"
    raise ValueError(
        f"export: expected a model of text or of images alone, got {type(model).__name__}, which "
        f"takes {main} and has no export. Use it in transformers: model.save_pretrained(folder)"
    )


def forward_arguments(model: nn.Module) -> set[str]:
    """Names that `model.forward` takes."""
    return set(inspect.signature(model.forward).parameters)
