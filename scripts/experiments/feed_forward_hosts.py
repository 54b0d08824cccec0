"""Which blocks of neurons a trained host keeps, by predictors and by the rules beside them.

Used by `sparse_feed_forward.py`, which says what the arms are.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from lean_hosts import Host
from paired_changes import paired
from torch import Tensor, nn
from window_losses import window_losses

from gravity_hf import sparsity
from gravity_hf.integration.predictor_fit import (
    calibrate_blocks,
    fit_predictors,
    measure_feed_forward,
)
from gravity_hf.integration.sparse_feed_forward import sparse_layers, sparsify_feed_forward
from gravity_hf.layers.neuron_selection import block_energy
from gravity_hf.layers.sparse_feed_forward import SparseFeedForward
from gravity_hf.training.measures import mean_loss

ARMS = ("predictor", "oracle", "static", "random")
TIMED = 5


class Ranking(nn.Module):
    """In the place of a predictor: scores of blocks by any rule."""

    def __init__(self, rule: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.rule = rule

    def forward(self, x: Tensor) -> Tensor:
        return self.rule(x)


def ranking(arm: str, layer: SparseFeedForward, means: Tensor) -> Ranking:
    """`means` `[blocks]`: energies of the layer's blocks on other text."""
    if arm == "static":
        return Ranking(lambda x: means.expand(*x.shape[:-1], -1))
    if arm == "random":
        return Ranking(lambda x: torch.rand(*x.shape[:-1], layer.blocks, device=x.device))
    return Ranking(lambda x: block_energy(layer.neurons(x), layer.block_size))


@torch.no_grad()
def mean_energies(model: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of every layer's blocks, over the tokens of a batch."""
    found: dict[str, Tensor] = {}

    def watch(name: str) -> Callable[..., None]:
        def hook(layer: SparseFeedForward, given: tuple[Tensor, ...]) -> None:
            energy = block_energy(layer.neurons(given[0]), layer.block_size)
            found[name] = energy.flatten(0, -2).mean(0)

        return hook

    layers = sparse_layers(model)
    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    with sparsity(model, feed_forward="dense"):
        model(**{name: ids.to(model.device) for name, ids in batch.items()})
    for hook in hooks:
        hook.remove()
    return found


def measured(model: Any, windows: list[Tensor]) -> dict[str, float]:
    """Loss under the mask, and the share of the energy that it keeps in the dense model."""
    with sparsity(model, feed_forward="masked"):
        loss = mean_loss(model, windows)
    return {"loss": loss, "energy_recall": energy_recall(model, windows[0])}


def energy_recall(model: Any, ids: Tensor) -> float:
    """Of the dense model's energy the share in the blocks that are kept, mean over layers."""
    quality = measure_feed_forward(model, [{"input_ids": ids}]).values()
    return sum(float(layer.energy_recall) for layer in quality) / len(quality)


def masked_losses(model: Any, windows: list[Tensor], seed: int) -> list[float]:
    """Of every window under the mask; `seed`: of a choice by lot."""
    torch.manual_seed(seed)
    with sparsity(model, feed_forward="masked"):
        return window_losses(model, windows)


@torch.no_grad()
def forward_ms(model: Any, ids: Tensor, policy: str) -> float:
    """Median time of a forward."""
    ids, times = ids.to(model.device), []
    with sparsity(model, feed_forward=policy):
        for _ in range(TIMED + 1):
            _wait(model)
            started = time.perf_counter()
            model(input_ids=ids, use_cache=False, logits_to_keep=1)
            _wait(model)
            times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[1:])


def _wait(model: Any) -> None:
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def host_rows(
    host: Host, choice: tuple[int, float], scale: Any, device: str
) -> Iterator[dict[str, Any]]:
    """The rows of one host and one choice, every arm in both orders of neurons.

    `choice`: size of a block, sparsity. `scale`: a `Scale` of `sparse_feed_forward.py`."""
    block, share = choice
    length = min(scale.length, host.length)
    windows = list(host.held_out(scale.held_out, length).split(scale.rows))
    text = host.calibration(scale.fit_batches * scale.rows, length, seed=host.seed)
    batches = [{"input_ids": ids} for ids in text.split(scale.rows)]
    for reordered in (False, True):
        model = host.load(device)
        if not reordered:
            dense = window_losses(model, windows)
        sparsify_feed_forward(model, block_size=block, sparsity=share)
        if reordered:
            calibrate_blocks(model, batches)
        base = {"seed": host.seed, "block_size": block, "sparsity": share, "reordered": reordered}
        fit = fit_predictors(model, batches, learning_rate=scale.fit_rate)
        means = mean_energies(model, batches[0])
        predictors = {name: layer.predictor for name, layer in sparse_layers(model).items()}
        for arm in ARMS if not reordered else ARMS[:-1]:
            for name, layer in sparse_layers(model).items():
                own = predictors[name] if arm == "predictor" else ranking(arm, layer, means[name])
                layer.predictor = own
            losses = masked_losses(model, windows, host.seed)
            row = {**base, "arm": arm, "length": length, "windows": len(losses)}
            row |= {"loss": statistics.fmean(losses), "dense_loss": statistics.fmean(dense)}
            row["excess"], row["excess_error"] = paired(losses, dense).values()
            row["energy_recall"] = energy_recall(model, windows[0])
            if arm == "predictor":
                row["fit"] = fit.summary()
                policies = ("dense", "masked", "block")
                row["forward_ms"] = {p: forward_ms(model, windows[0], p) for p in policies}
            yield row
