"""What is refused before any work: settings that contradict each other, packages that are missing,
an output folder that holds something else."""

from __future__ import annotations

import importlib.util
import math

from .settings import SKIPPABLE, ConversionSettings

_NEEDED = {"peft": "lora", "accelerate": "transfer and lora", "datasets": "training data"}


def check_settings(settings: ConversionSettings) -> None:
    """Raise ValueError or ImportError; changes nothing."""
    model, gravity = settings.model, settings.gravity
    if not model.model or not model.out:
        missing = "model" if not model.model else "out"
        raise ValueError(f"{missing}: expected a value, got none. Give --{missing}")
    unknown = sorted(set(model.skip) - set(SKIPPABLE))
    if unknown:
        raise ValueError(f"skip: expected steps out of {list(SKIPPABLE)}, got {unknown}")
    # Its own checks name the field.
    settings.config()
    settings.training.check()
    _check_numbers(settings)
    if "calibrate" in model.skip and (gravity.distance == "lifted" or gravity.fit):
        raise ValueError(
            "skip: calibrate: lifted keys and fitted heads need data, got "
            f"distance {gravity.distance!r}, fit {gravity.fit}. Give --distance euclidean for "
            "Gravity-2's constants, or do not skip the calibration"
        )
    if settings.lora.anneal_to is not None:
        _check_annealing(settings)
    if settings.trains and model.device.startswith("cuda:"):
        raise ValueError(
            f"device: expected auto, cpu or cuda where something is trained, got {model.device!r}. "
            "Choose a GPU with CUDA_VISIBLE_DEVICES=..."
        )
    if settings.trains:
        _require_packages()
    data, stride = settings.data, settings.evaluation.stride
    if stride is not None and (stride > data.length or data.packing != "blocks"):
        raise ValueError(
            f"stride: expected at most the length, {data.length}, and packing 'blocks', whose "
            f"examples follow each other, got {stride} and packing {data.packing!r}"
        )
    if "evaluate" not in model.skip and not (
        data.validation_share or data.validation_files or data.dataset_validation_split
    ):
        raise ValueError(
            "validation_share: expected more than 0, or validation_files, to measure on, got 0. "
            "Set one of them, or skip evaluate"
        )


def _check_annealing(settings: ConversionSettings) -> None:
    missing = {"calibrate", "lora"} - settings.active({"calibrate", "lora"})
    if missing:
        raise ValueError(
            f"anneal_to: the softness falls from the calibrated one while LoRA trains; expected "
            f"these steps, which are left out: {sorted(missing)}"
        )
    if settings.gravity.max_kl is None and settings.lora.anneal_to > settings.gravity.softness:
        raise ValueError(
            f"anneal_to: expected at most the softness, {settings.gravity.softness:g}, got "
            f"{settings.lora.anneal_to:g}"
        )


def _check_numbers(settings: ConversionSettings) -> None:
    gravity, transfer, lora = settings.gravity, settings.transfer, settings.lora
    at_least = {
        "softness": (gravity.softness, 0.0),
        "samples": (gravity.samples, 1),
        "transfer_steps": (transfer.transfer_steps, 0),
        "lora_steps": (lora.lora_steps, 0),
        "lora_rank": (lora.lora_rank, 1),
        "lora_alpha": (lora.lora_alpha, 1),
        "distillation": (lora.distillation, 0.0),
        "evaluation_samples": (settings.evaluation.evaluation_samples, 1),
        "prompt_tokens": (settings.evaluation.prompt_tokens, 1),
        "length": (settings.data.length, 8),
    }
    for name, (value, least) in at_least.items():
        if not math.isfinite(value) or value < least:
            raise ValueError(f"{name}: expected at least {least:g}, got {value!r}")
    positive = {
        "max_kl": gravity.max_kl,
        "temperature": lora.temperature,
        "transfer_learning_rate": transfer.transfer_learning_rate,
        "lora_learning_rate": lora.lora_learning_rate,
        "stride": settings.evaluation.stride,
        "anneal_to": lora.anneal_to,
    }
    for name, value in positive.items():
        if value is not None and (not math.isfinite(value) or value <= 0):
            raise ValueError(f"{name}: expected more than 0, got {value!r}")


def _require_packages() -> None:
    for package, purpose in _NEEDED.items():
        if importlib.util.find_spec(package) is None:
            raise ImportError(
                f"convert needs {package} for {purpose}, which is not installed: "
                "pip install 'gravity_hf[train]'"
            )
