"""Which model class stands for a model type: one with a head where there is one."""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Iterator

import transformers
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto

_SEQUENCE = ("SEQ_TO_SEQ_CAUSAL_LM", "SPEECH_SEQ_2_SEQ")
_MULTIMODAL = ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM", "TEXT_TO_WAVEFORM")
_TEXT = ("MASKED_LM", "CAUSAL_LM")
_VISION = (
    "OBJECT_DETECTION",
    "UNIVERSAL_SEGMENTATION",
    "INSTANCE_SEGMENTATION",
    "DEPTH_ESTIMATION",
    "KEYPOINT_DETECTION",
    "KEYPOINT_MATCHING",
    "POSE_ESTIMATION",
    "IMAGE_MATTING",
    "IMAGE_TO_IMAGE",
    "VIDEO_CLASSIFICATION",
    "IMAGE_CLASSIFICATION",
    "SEMANTIC_SEGMENTATION",
    "TABLE_RECOGNITION",
    "TEXT_RECOGNITION",
)
_AUDIO = ("CTC", "RNNT", "TDT", "AUDIO_CLASSIFICATION", "TEXT_TO_SPECTROGRAM")
_TIME = ("TIME_SERIES_PREDICTION", "TIME_SERIES_CLASSIFICATION", "TIME_SERIES_REGRESSION")
_WHOLE = ("ZERO_SHOT_IMAGE_CLASSIFICATION", "ZERO_SHOT_OBJECT_DETECTION", "MASK_GENERATION")


def model_class(config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class to build for `config`, None where transformers has none."""
    named = list(_named(config))
    own = [cls for cls in named if cls.config_class is type(config)]
    # A type without a class of its own (an alias) is built by the one its name stands for.
    return next(iter(own), None) or _from_modules(type(config)) or next(iter(named), None)


def _named(config: PreTrainedConfig) -> Iterator[type[PreTrainedModel]]:
    """The classes that the Auto tables give for a model type, best first."""
    for tables in _preferences(config):
        for table in tables:
            names = _mapping(table).get(config.model_type, ())
            for name in (names,) if isinstance(names, str) else names:
                if hasattr(transformers, name):
                    yield getattr(transformers, name)


def _preferences(config: PreTrainedConfig) -> Iterator[tuple[str, ...]]:
    if config.is_encoder_decoder:
        yield _SEQUENCE
    parts = set(config.sub_configs)
    if parts & {"text_config", "vision_config", "audio_config", "qformer_config"}:
        yield _MULTIMODAL + _WHOLE + ("CAUSAL_LM", *_SEQUENCE)
        if "text_config" in parts:
            yield _VISION[:2] + ("",)
    yield _TEXT + _SEQUENCE + _MULTIMODAL + _VISION + _AUDIO + _TIME + ("",)


def _mapping(table: str) -> dict[str, str]:
    name = f"MODEL_FOR_{table}_MAPPING_NAMES" if table else "MODEL_MAPPING_NAMES"
    return getattr(modeling_auto, name, {})


def _from_modules(config_class: type[PreTrainedConfig]) -> type[PreTrainedModel] | None:
    """A model class that declares this configuration, from the package that defines it."""
    found = [cls for cls in _classes_beside(config_class) if cls.config_class is config_class]
    return max(found, key=_rank, default=None)


def _rank(cls: type[PreTrainedModel]) -> tuple[bool, ...]:
    name = cls.__name__
    endings = (name.endswith(ending) for ending in ("Model", "Backbone"))
    return ("PreTrainedModel" not in name, "For" in name, *endings)


@functools.cache
def _package_modules(package: str) -> tuple[str, ...]:
    path = importlib.import_module(package).__path__
    names = (m.name for m in pkgutil.iter_modules(path))
    return tuple(f"{package}.{name}" for name in names if name.startswith("modeling_"))


def _classes_beside(config_class: type[PreTrainedConfig]) -> Iterator[type[PreTrainedModel]]:
    package = config_class.__module__.rpartition(".")[0]
    for module in _package_modules(package):
        for member in vars(importlib.import_module(module)).values():
            own = getattr(member, "__module__", None) == module
            if own and isinstance(member, type) and issubclass(member, PreTrainedModel):
                yield member
