"""What a training leaves in its folder for figures: a few held-out inputs, and the alphas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ...training.geolip.history import ALPHAS_FILE

# Inputs of one forward pass by their names: `patches` `[B, N, P]` or `pixel_values`
# `[B, C, H, W]`, and, where there are such, `attention_mask` `[B, N]` and `labels`.
SAMPLES_FILE = "samples.safetensors"
# `steps` `[S]` and `alphas` `[S, L, D]`.
HISTORY_FILE = ALPHAS_FILE
_INPUTS = ("patches", "pixel_values")
_KNOWN = (*_INPUTS, "attention_mask", "labels")


@dataclass(frozen=True, eq=False)
class AlphaCurves:
    """`alphas` `[S, L, D]`: of each spectral layer and mode after each of `steps` `[S]`; float32,
    on the CPU."""

    steps: Tensor
    alphas: Tensor

    @classmethod
    def of(cls, history: AlphaCurves | Mapping[str, Any]) -> AlphaCurves:
        """Of itself, or of a mapping with `steps` and `alphas`.

        Raises:
            ValueError: shapes that do not belong together.
        """
        if isinstance(history, AlphaCurves):
            return history
        try:
            steps, alphas = (torch.as_tensor(history[name]) for name in ("steps", "alphas"))
        except KeyError as error:
            raise ValueError(
                f"history: expected 'steps' and 'alphas', got {sorted(history)}"
            ) from error
        if steps.ndim != 1 or alphas.ndim != 3 or len(steps) != len(alphas):
            raise ValueError(
                "history: expected steps [S] and alphas [S, layers, modes], got "
                f"{list(steps.shape)} and {list(alphas.shape)}"
            )
        return cls(steps.cpu(), alphas.float().cpu())


def read_samples(folder: Path) -> dict[str, Tensor] | None:
    """The inputs that a training kept in its folder; None where it kept none.

    Raises:
        ValueError: a file that holds something else.
    """
    tensors = _tensors(folder / SAMPLES_FILE)
    if tensors is None:
        return None
    inputs = [name for name in _INPUTS if name in tensors]
    if len(inputs) != 1 or set(tensors) - set(_KNOWN):
        raise ValueError(
            f"{folder / SAMPLES_FILE}: expected either patches or pixel_values, and beside them "
            f"attention_mask and labels at most, got {sorted(tensors)}. Train again, or delete it"
        )
    # They may be stored in half precision.
    return {n: t.float() if t.is_floating_point() else t for n, t in tensors.items()}


def read_history(folder: Path) -> AlphaCurves | None:
    """The alphas that a training wrote down; None where there are none, or it had no steps."""
    tensors = _tensors(folder / HISTORY_FILE)
    # Without spectral layers every step has none.
    if tensors is None or ("alphas" in tensors and not tensors["alphas"].numel()):
        return None
    return AlphaCurves.of(tensors)


def _tensors(file: Path) -> dict[str, Tensor] | None:
    if not file.is_file():
        return None
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(
            f"{file}: expected a safetensors file, got one that cannot be read ({error}). Train "
            "again, or delete it"
        ) from error
