"""How far the host itself goes when its attention outputs are moved as far as gravity moves them.

A random host may be one that no approximation of its attention comes near: a router or an indexer
that decides by a hair, or queries that see one key out of many. That is told from a weakness of
gravity by a control: the host with its own dot product and another temperature of its softmax, in
every attention module the one that moves the output as far as gravity does on the same q, k, v.

The control is held to the same model with its dot product as it is: what the way to it loses, a
mask say, both lose, and it is no sensitivity.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from gravity_hf.integration.attention import AttentionCall
from gravity_hf.integration.hosts import gravity_modules

from .sight import Inputs, Sight

_OCTAVES = 3.0
_BISECTIONS = 12


def relative_distance(actual: Tensor, exact: Tensor) -> float:
    return ((actual - exact).norm() / exact.norm().clamp(min=1e-30)).item()


def cosine_of_all(actual: Tensor, exact: Tensor) -> float:
    """Of the whole tensors as one vector."""
    a, b = (x.double().flatten() for x in (actual, exact))
    return torch.nn.functional.cosine_similarity(a, b, dim=0).item()


class _Local:
    """How far gravity's output is from the dot product's, call by call; the host goes on."""

    def __init__(self) -> None:
        self.distances: list[float] = []
        self.cosines: list[float] = []

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        host, weights = call.dot_product()
        gravity, _ = call.gravity()
        self.distances.append(relative_distance(gravity, host))
        self.cosines.append(cosine_of_all(gravity, host))
        return host, weights


class _Tempered:
    """The dot product at a temperature that moves its output by the given distance, call by call.

    Args:
        distances: relative, one per call.
        direction: 1 for a sharper softmax, -1 for a flatter one.
    """

    def __init__(self, distances: list[float], direction: int) -> None:
        self.distances, self.direction = list(distances), direction

    def attend(self, call: AttentionCall) -> tuple[Tensor, Tensor | None]:
        host, weights = call.dot_product()
        distance = self.distances.pop(0)
        low, high = 0.0, _OCTAVES
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2.0
            near = relative_distance(self._at(call, middle), host) < distance
            low, high = (middle, high) if near else (low, middle)
        # From below: never further than gravity.
        return self._at(call, low), weights

    def _at(self, call: AttentionCall, octaves: float) -> Tensor:
        scaling = call.scaling if call.scaling else call.query.shape[-1] ** -0.5
        factor = 2.0 ** (self.direction * octaves)
        return dataclasses.replace(call, scaling=scaling * factor).dot_product()[0]


@dataclasses.dataclass(frozen=True)
class Sensitivity:
    """`local`: the lowest cosine between gravity's and the host's output of one attention call on
    the same q, k, v; `moved`: the cosine of the output by dot product to itself under the control,
    the lower one of a sharper and a flatter softmax."""

    local: float
    moved: float


@torch.no_grad()
def sensitivity_of(model: PreTrainedModel, inputs: Inputs, sight: Sight) -> Sensitivity:
    """Of a calibrated model, which is its own host under the dot product."""
    local = {name: _Local() for name in gravity_modules(model)}
    host = observed(model, local, inputs, sight)
    moved = []
    for direction in (1, -1):
        tempered = {name: _Tempered(seen.distances, direction) for name, seen in local.items()}
        moved.append(cosine_of_all(observed(model, tempered, inputs, sight), host))
    cosines = [cosine for seen in local.values() for cosine in seen.cosines]
    return Sensitivity(min(cosines), min(moved))


def observed(
    model: PreTrainedModel, observers: Mapping[str, Any], inputs: Inputs, sight: Sight
) -> Tensor:
    """What `sight` sees, padding as zeros, under one observer per gravity module, by its name."""
    modules = gravity_modules(model)
    for name, gravity in modules.items():
        gravity.observer = observers[name]
    try:
        return sight(model, inputs, True)
    finally:
        for gravity in modules.values():
            gravity.observer = None
