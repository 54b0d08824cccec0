"""Weakening gravity in place, and the mean force that decides whether to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from ..layers.parameters import GravityParameters, inverse_softplus

_logger = logging.get_logger(__name__)


def damp_gravity(model: nn.Module, factor: float) -> int:
    """Multiply every force of `model` by `factor`, in place.

    Each parameter named `G`, a scalar or one number for each head (`[H]`), of attention and of
    fusion, is multiplied by it. A patched host has none: there the squared mass `M^2` is, through
    softplus. A parameter that modules share is changed once; the frozen originals that peft keeps
    beside its copies are left alone, and so is what is frozen: an adapter, which trains beside it,
    would not hold the change. That is said once.

    Args:
        model: of any kind.
        factor: above 0.

    Returns:
        How many parameters were changed.

    Raises:
        ValueError: a factor that is not above 0 and finite.
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"damp_gravity: factor: expected a finite number > 0, got {factor!r}")
    seen: set[int] = set()
    frozen: set[int] = set()
    with torch.no_grad():
        for constant, is_mass in _strengths(model):
            if not constant.requires_grad:
                frozen.add(id(constant))
                continue
            if id(constant) in seen:
                continue
            seen.add(id(constant))
            if is_mass:
                mass = nn.functional.softplus(constant.double()) * math.sqrt(factor)
                constant.copy_(inverse_softplus(mass.clamp(min=torch.finfo(torch.float32).tiny)))
            else:
                constant.mul_(factor)
    if frozen:
        _logger.warning_once(
            f"damp_gravity: {len(frozen)} frozen strengths of gravity stay as they are. To have "
            'them damped under LoRA, train them: modules_to_save=["gravity"]'
        )
    return len(seen)


def _strengths(model: nn.Module) -> Iterator[tuple[nn.Parameter, bool]]:
    for name, module in model.named_modules():
        if "original_module" in name.split("."):
            continue
        if isinstance(module, GravityParameters):
            yield module.mass_log, True
        elif (constant := module._parameters.get("G")) is not None:
            yield constant, False


def mean_force(diagnostics: Any) -> float:
    """The mean over layers of what `diagnostics` calls their `mean_force`; 0.0 for none.

    Args:
        diagnostics: reports of a mirror; or a mapping with `layers`, a list of mappings; or such
            mappings by stream. NaN counts as an infinite force.
    """
    forces = [float(force) for force in _forces(diagnostics)]
    mean = sum(forces) / len(forces) if forces else 0.0
    return math.inf if math.isnan(mean) else mean


def _forces(found: Any) -> Iterator[float | Tensor]:
    if isinstance(found, Mapping):
        if "layers" in found:
            yield from _forces(found["layers"])
        elif "mean_force" in found:
            yield found["mean_force"]
        else:
            yield from _forces(list(found.values()))
    elif isinstance(found, (list, tuple)) and not hasattr(found, "mean_force"):
        for entry in found:
            yield from _forces(entry)
    elif (force := getattr(found, "mean_force", None)) is not None:
        yield force
