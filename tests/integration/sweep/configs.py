"""A tiny random model of every model type that transformers has a configuration for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from integration.sweep.model_classes import model_class
from integration.sweep.overrides import DEFAULTS, OVERRIDES
from integration.sweep.shrinking import Shrinker
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING


class NotBuilt(Exception):
    """A model type has no tiny model here; the message says why, in a plain sentence."""


def tiny_config(model_type: str) -> PreTrainedConfig:
    """A configuration of two layers or so, 64 wide.

    Raises:
        NotBuilt: the type is unknown, or its class refuses (for some also the defaults).
    """
    if model_type not in CONFIG_MAPPING:
        raise NotBuilt("not a model type of this transformers")
    config_class = CONFIG_MAPPING[model_type]
    try:
        return Shrinker(OVERRIDES).tiny(config_class(**DEFAULTS.get(model_type, {})))
    except ImportError as error:
        raise NotBuilt(_needs(error)) from error
    except Exception as error:
        raise NotBuilt(f"config refused: {_one_line(error)}") from error


def tiny_model(model_type: str, seed: int = 0) -> PreTrainedModel:
    """A random model of this type in evaluation mode and float32, on the CPU.

    Raises:
        NotBuilt: there is no model class, a library is missing, or the class refuses the tiny
            configuration.
    """
    config = tiny_config(model_type)
    try:
        built = model_class(config)
        if built is None:
            raise NotBuilt("no model class")
        with torch.random.fork_rng(devices=[]), _uninitialised_as_nan():
            torch.manual_seed(seed)
            model = built(config).float().eval()
            _enliven(model)
    except ImportError as error:
        raise NotBuilt(_needs(error)) from error
    except NotBuilt:
        raise
    except Exception as error:
        raise NotBuilt(f"model refused: {type(error).__name__}: {_one_line(error)}") from error
    return model


@contextlib.contextmanager
def _uninitialised_as_nan() -> Iterator[None]:
    """Memory that a model leaves uninitialised is the same in every run."""
    before = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warned)


@torch.no_grad()
def _enliven(model: PreTrainedModel) -> None:
    """Random numbers where a model starts from a constant.

    Gates at zero, layer scales near zero and uninitialised memory would hide what attention does.
    """
    for parameter in model.parameters():
        if not parameter.is_floating_point() or parameter.numel() == 0:
            continue
        if not parameter.isfinite().all():
            parameter.normal_(std=0.2)
        elif bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(torch.randn_like(parameter).abs_(), alpha=0.1)


def _needs(error: ImportError) -> str:
    for library in ("timm", "natten", "detectron2", "torchvision", "torchaudio", "scipy"):
        if library in str(error).lower():
            return f"needs {library}"
    return f"needs a library: {_one_line(error)}"


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
