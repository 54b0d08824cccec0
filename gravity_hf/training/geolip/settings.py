"""What is trained on what, as settings: for command lines and for Python."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from ...models.geolip.configuration_geolip import GEOLIP_PRESETS, GeolipConfig

__all__ = ["FeatureSettings", "GeolipSettings", "ImageSettings"]

# Those that say where something is or how often it is shown; the rest makes the model.
_SHOWN = ("out", "resume", "force", "progress", "report_to", "save_steps", "cache", "host_batch")


@dataclass(frozen=True, kw_only=True)
class GeolipSettings:
    """What features and images have in common.

    Args:
        out: folder for the model and what was measured. None: nothing is kept, checkpoints neither.
        preset: sizes of the model, `GeolipConfig.from_preset`.
        overrides: settings of GeolipConfig that win over the preset's.
        steps: optimiser steps.
        epochs: passes over the data, instead of `steps`.
        batch_size: rows of a step on each device: texts, or images.
        learning_rate: the largest; it rises for `warmup_steps` and falls along a cosine.
        denoise: standard deviation of noise on the input that the model learns to take away; of
            images in units of their pixels, from -1 to 1, of features in standard deviations.
        held_out: share of the texts or images that is not trained on.
        seed: of the model, the split, the order and the noise.
        eval_steps, save_steps, logging_steps: steps between evaluations, checkpoints, losses.
            save_steps is a multiple of logging_steps.
        report_to: "none", or what shows curves: "tensorboard", "trackio".
        bf16: mixed precision.
        device: "auto", or "cpu".
        progress: show bars where there is a terminal.
        resume: go on from the last checkpoint in `out`, of a run with these settings.
        force: replace a model in `out`.

    Raises:
        ValueError: a value outside its range, or settings that GeolipConfig does not take.
        ImportError: `report_to` without its package.
    """

    out: str | None = None
    preset: str = "tiny"
    overrides: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 600
    epochs: int | None = None
    batch_size: int = 16
    learning_rate: float = 1e-3
    warmup_steps: int = 30
    denoise: float = 0.0
    held_out: float = 0.1
    seed: int = 0
    eval_steps: int = 200
    save_steps: int = 200
    logging_steps: int = 20
    report_to: str = "none"
    bf16: bool = False
    device: str = "auto"
    progress: bool = False
    resume: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "eval_steps", "save_steps", "logging_steps"):
            self._check_count(name, 1)
        for name in ("seed", "warmup_steps"):
            self._check_count(name, 0)
        if self.epochs is not None:
            self._check_count("epochs", 1)
        if not 0 < self.learning_rate < math.inf or not 0 <= self.denoise < math.inf:
            raise ValueError(
                "learning_rate, denoise: expected numbers above 0 and of at least 0, got "
                f"{self.learning_rate!r} and {self.denoise!r}"
            )
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out: expected a share in (0, 1), got {self.held_out!r}")
        if self.save_steps % self.logging_steps:
            raise ValueError(
                f"save_steps: expected a multiple of logging_steps ({self.logging_steps}), got "
                f"{self.save_steps}. A resumed run could not report the same losses otherwise"
            )
        if self.device not in ("auto", "cpu"):
            raise ValueError(
                f"device: expected 'auto' or 'cpu', got {self.device!r}. Choose a GPU with "
                "CUDA_VISIBLE_DEVICES=..."
            )
        if self.out is None and (self.resume or self.force):
            raise ValueError("resume, force: expected `out`, the folder they are about, got none")
        self._check_reports()
        self.model_config()

    def model_config(self, **sizes: Any) -> GeolipConfig:
        """Of the model: preset, what the data asks for (`sizes`), `overrides`; the last wins.

        Raises:
            ValueError: an unknown preset or name, values that do not fit.
        """
        if self.preset not in GEOLIP_PRESETS:
            raise ValueError(f"preset: expected one of {list(GEOLIP_PRESETS)}, got {self.preset!r}")
        try:
            return GeolipConfig.from_preset(self.preset, **{**sizes, **self.overrides})
        except StrictDataclassError as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"overrides: expected settings of a geolip that fit together: {reason}"
            ) from error

    def that_matter(self) -> dict[str, Any]:
        """All that makes the model what it is, JSON-able."""
        return {name: value for name, value in self.to_dict().items() if name not in _SHOWN}

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {**asdict(self), "overrides": dict(self.overrides)}

    def _check_count(self, name: str, least: int) -> None:
        value = getattr(self, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ValueError(f"{name}: expected a whole number of at least {least}, got {value!r}")

    def _check_reports(self) -> None:
        known = ("none", "tensorboard", "trackio")
        if self.report_to not in known:
            raise ValueError(f"report_to: expected one of {list(known)}, got {self.report_to!r}")
        if self.report_to != "none" and importlib.util.find_spec(self.report_to) is None:
            raise ImportError(
                f"report_to {self.report_to!r} needs {self.report_to}, which is not installed: "
                f"pip install {self.report_to}"
            )


@dataclass(frozen=True, kw_only=True)
class FeatureSettings(GeolipSettings):
    """A geolip of the features of a host.

    Args:
        host: name or folder of an encoder or decoder for `AutoModel`; it is not trained.
        layer: which hidden states are read: -1 the last, 0 the embeddings.
        max_length: tokens of a text, special ones included.
        text_files, dataset, dataset_config, text_column: what it reads, see `texts.load_texts`.
        texts: paragraphs at most, drawn by `seed`. None: all.
        host_batch: texts that the host reads at once.
        cache: folder for the features, for other runs with the same host and texts. None: they are
            kept until the run is over.
        companion: save host and geolip as one, as a GeolipCompanion.
    """

    preset: str = "base"
    steps: int = 1500
    learning_rate: float = 2e-3
    host: str = ""
    layer: int = -1
    max_length: int = 128
    text_files: tuple[str, ...] = ()
    dataset: str | None = None
    dataset_config: str | None = None
    text_column: str = "text"
    texts: int | None = None
    host_batch: int = 32
    cache: str | None = None
    companion: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_length", "host_batch"):
            self._check_count(name, 1)
        if self.texts is not None:
            self._check_count("texts", 3)
        if self.text_files and self.dataset:
            raise ValueError("text_files, dataset: expected one of them, got both. Leave one out")
        if self.companion and self.out is None:
            raise ValueError("companion: expected `out`, the folder to save it in, got none")

    def to_dict(self) -> dict[str, Any]:
        return {**super().to_dict(), "text_files": list(self.text_files)}


@dataclass(frozen=True, kw_only=True)
class ImageSettings(GeolipSettings):
    """A geolip of the patches of images.

    Args:
        images: a kind of `synthetic_images`, a folder with images, or a data set.
        count: images at most. None: 1024 synthetic ones, or all.
        image_size, patch_size: in pixels; the one is a multiple of the other.
        dataset_config, image_column: of a data set.
    """

    images: str = "shapes"
    count: int | None = None
    image_size: int = 32
    patch_size: int = 4
    dataset_config: str | None = None
    image_column: str | None = None

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size"):
            self._check_count(name, 1)
        if self.count is not None:
            self._check_count("count", 3)
        super().__post_init__()

    def model_config(self, **sizes: Any) -> GeolipConfig:
        # Pixels are in [-1, 1] as they are.
        given = {
            "image_size": self.image_size,
            "patch_size": self.patch_size,
            "feature_norm": "none",
        }
        return super().model_config(**{**given, **sizes})
