"""What the choices of a forward keep of dense attention and of all neurons."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...layers.sparse_feed_forward import SparseFeedForward
from .attention import LeanFormerAttention
from .block import LeanFormerBlock


class Statistics:
    """Gathers one line for each layer while a model runs; every value is a tensor on its device,
    and nothing waits for it."""

    def __init__(self) -> None:
        self.found: dict[str, list[Tensor]] = {}

    def attention(self, layer: LeanFormerAttention, call: Any, screened: Any) -> None:
        """Called by a layer with what it attends with."""
        for name, value in layer.choice_statistics(call, screened).items():
            self.found.setdefault(name, []).append(value.mean())

    def feed_forward(self, layer: SparseFeedForward, read: Tensor, real: Tensor | None) -> None:
        """Called by a block with what its feed-forward network reads."""
        quality = layer.quality(read, real)
        for name, value in quality._asdict().items():
            self.found.setdefault(_NEURONS[name], []).append(value)

    def result(self) -> dict[str, Tensor]:
        """Float32 `[layers]` by name, see `observed`."""
        return {name: torch.stack([x.float() for x in x_all]) for name, x_all in self.found.items()}


_NEURONS = {
    "active": "neurons",
    "energy_recall": "neuron_energy_recall",
    "gate_recall": "block_recall",
}


@contextmanager
def observed(model: nn.Module) -> Iterator[Statistics]:
    """Inside, what a forward chooses is compared with what there is to choose from.

    Of every layer, whatever its policy at the moment:

    * `attention_recall`: of the weights of dense attention, those on the keys that it would look
      at, a mean over a sample of queries and over heads; `pairs`: the share of causal pairs that
      these are; `pairs_with_screening`: and what finding them costs, in the same unit.
    * `neurons`: the share of neurons that a token keeps; `neuron_energy_recall`: of the sum of
      squares of all neurons, theirs; `block_recall`: of the blocks of most energy, those that are
      among the chosen.

    Attention without screening has none of the first three. Padding counts nowhere.
    """
    statistics = Statistics()
    watched = [
        *((x, statistics.attention) for x in model.modules() if isinstance(x, LeanFormerAttention)),
        *((x, statistics.feed_forward) for x in model.modules() if isinstance(x, LeanFormerBlock)),
    ]
    try:
        for layer, observer in watched:
            layer.observer = observer
        yield statistics
    finally:
        for layer, _ in watched:
            layer.observer = None
