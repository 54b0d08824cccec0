"""Predictors of sparse feed-forward layers, fitted to a model whose weights stay as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from tqdm.auto import tqdm

from ..layers.calibration_inputs import calibration_batches
from ..layers.modes import in_evaluation
from ..layers.neuron_order import co_active_order, reorder
from ..layers.neuron_selection import ChoiceQuality, block_energy, choice_loss
from ..layers.sparse_feed_forward import SparseFeedForward
from ..layers.sparsity_policy import sparsity
from .placement import execution_device
from .sparse_feed_forward import mark_fitted, sparse_layers

# What a layer is shown: its inputs `[tokens, d]` of one batch, without padding.
_Look = Callable[[str, SparseFeedForward, Tensor], None]


@dataclass(frozen=True)
class PredictorFit:
    """Means over layers and over the tokens of the last batch, which is fitted to after it has been
    measured.

    loss_before, loss_after: of the choice, ln 2 at chance.
    energy_recall: share of `h^2` that the predictors keep; random_recall: that as many blocks at
    random keep, on average; gate_recall: share of the best blocks that they find.
    unreached: layers that no batch reached, such as those of a vision tower: they are as they were.
    """

    steps: int
    loss_before: float
    loss_after: float
    energy_recall: float
    gate_recall: float
    random_recall: float
    unreached: tuple[str, ...] = ()

    def summary(self) -> dict[str, float]:
        """JSON-able."""
        return asdict(self)


def fit_predictors(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    epochs: int = 1,
    learning_rate: float = 1e-2,
    tokenizer: Any = None,
    progress: bool | None = None,
) -> PredictorFit:
    """Train the predictors of all sparse feed-forward layers, and nothing else, in place.

    The model runs dense; each batch is one step of Adam for every layer, in float32 whatever the
    model is in. Layers that were waiting for it go over to the policy that `sparsify_feed_forward`
    was given.

    Args:
        model: after `sparsify_feed_forward`, or a LeanFormer.
        batches: model inputs as dicts of tensors, or texts with `tokenizer`; some hundred batches
            of some thousand tokens.
        epochs: how often they are gone through.
        learning_rate: falls to 0 along a cosine.
        progress: True or False; None shows a bar on terminals only.

    Raises:
        ValueError: a model without such layers, none that a batch reaches, no batches, or epochs
            below 1.
    """
    inputs = calibration_batches("fit_predictors", batches, tokenizer)
    layers = _layers_of(model, "fit_predictors")
    if epochs < 1:
        raise ValueError(f"fit_predictors: epochs: expected at least 1, got {epochs!r}")
    fit = _Fit(layers, epochs * len(inputs), learning_rate)
    hidden = None if progress is None else not progress
    steps = [batch for _ in range(epochs) for batch in inputs]
    for batch in tqdm(steps, desc="fit_predictors", unit="batch", disable=hidden):
        _show(model, layers, batch, fit.look)
        fit.step()
    mark_fitted(model, fit.reached)
    return fit.report()


@torch.no_grad()
def measure_feed_forward(
    model: nn.Module, batches: Iterable[Any], *, tokenizer: Any = None
) -> dict[str, ChoiceQuality]:
    """How good each layer's choice is on some batches, of the dense model; by layer, tensors."""
    inputs = calibration_batches("measure_feed_forward", batches, tokenizer)
    layers = _layers_of(model, "measure_feed_forward")
    sums: dict[str, Tensor] = {}
    counts: dict[str, int] = {}

    def look(name: str, layer: SparseFeedForward, x: Tensor) -> None:
        sums[name] = sums.get(name, 0.0) + torch.stack(layer.quality(x)) * len(x)
        counts[name] = counts.get(name, 0) + len(x)

    for batch in inputs:
        _show(model, layers, batch, look)
    return {name: ChoiceQuality(*(sums[name] / counts[name]).unbind()) for name in sums}


@torch.no_grad()
def calibrate_blocks(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    samples: int = 2048,
    tokenizer: Any = None,
    progress: bool | None = None,
) -> None:
    """Put neurons that are active together into the same blocks, in place, before
    `fit_predictors`: a block of them is needed by fewer tokens.

    The model computes what it did, up to rounding. `densify_feed_forward` undoes it; of a model
    that was saved since and loaded again it does not, since a checkpoint holds the new order.

    Args:
        model: after `sparsify_feed_forward`, or a LeanFormer.
        batches: as of `fit_predictors`; the first tokens of them are looked at.
        samples: tokens to look at; a layer keeps `samples * F` numbers meanwhile.
        progress: True or False; None shows a bar on terminals only.

    Raises:
        ValueError: a model without such layers, no batches, or maps that are adapters or quantized.
    """
    inputs = calibration_batches("calibrate_blocks", batches, tokenizer)
    layers = _layers_of(model, "calibrate_blocks")
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}

    def look(name: str, layer: SparseFeedForward, x: Tensor) -> None:
        missing = samples - sum(map(len, seen[name]))
        if missing > 0:
            hidden = layer.neurons(x[:missing]).float()
            # A token is a vote, however large its activations are.
            scale = hidden.square().mean(-1, keepdim=True).sqrt()
            seen[name].append(hidden.abs() / scale.clamp(min=torch.finfo(scale.dtype).tiny))

    for batch in inputs:
        if min(sum(map(len, parts)) for parts in seen.values()) < samples:
            _show(model, layers, batch, look)
    hidden = None if progress is None else not progress
    reached = [name for name, parts in seen.items() if parts]
    for name in tqdm(reached, desc="calibrate_blocks", unit="layer", disable=hidden):
        order = co_active_order(torch.cat(seen[name]).T, layers[name].block_size)
        reorder(layers[name], order)


class _Fit:
    """The optimizer of all predictors, and what they got wrong before each step.

    It trains float32 copies: in float16 the squares of gradients, and with them what Adam divides
    by, are 0; in bfloat16 late steps are lost in rounding."""

    def __init__(self, layers: Mapping[str, SparseFeedForward], steps: int, rate: float) -> None:
        self.layers = layers
        self.copies = {
            name: {key: _copy(p) for key, p in layer.predictor.named_parameters()}
            for name, layer in layers.items()
        }
        parameters = [p for copy in self.copies.values() for p in copy.values()]
        self.optimizer = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, steps)
        self.steps = 0
        self.reached: dict[str, None] = {}
        self.losses: list[Tensor] = []
        self._losses: list[Tensor] = []
        self._qualities: list[Tensor] = []
        self._random = [layer.keep / layer.blocks for layer in layers.values()]

    def look(self, name: str, layer: SparseFeedForward, x: Tensor) -> None:
        energy = block_energy(layer.neurons(x), layer.block_size)
        copy = self.copies[name]
        wide = x.to(next(iter(copy.values())).dtype)
        with torch.enable_grad():
            scores = functional_call(layer.predictor, copy, (wide,))
            loss = choice_loss(scores, energy, layer.keep)
            loss.backward()
        self.reached[name] = None
        self._losses.append(loss.detach())
        self._qualities.append(torch.stack(layer.quality(x)))

    @torch.no_grad()
    def step(self) -> None:
        if not self._losses:
            raise ValueError(
                "fit_predictors: expected batches that reach sparse feed-forward layers, got one "
                "that reaches none. Give what the part of the model with those layers reads"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.schedule.step()
        for name in self.reached:
            for key, parameter in self.layers[name].predictor.named_parameters():
                parameter.copy_(self.copies[name][key])
        self.losses.append(torch.stack(self._losses).mean())
        self.quality = ChoiceQuality(*torch.stack(self._qualities).mean(0).unbind())
        self._losses.clear()
        self._qualities.clear()
        self.steps += 1

    def report(self) -> PredictorFit:
        return PredictorFit(
            steps=self.steps,
            loss_before=float(self.losses[0]),
            loss_after=float(self.losses[-1]),
            energy_recall=float(self.quality.energy_recall),
            gate_recall=float(self.quality.gate_recall),
            random_recall=sum(self._random) / len(self._random),
            unreached=tuple(name for name in self.layers if name not in self.reached),
        )


def _copy(parameter: Tensor) -> Tensor:
    dtype = torch.promote_types(parameter.dtype, torch.float32)
    return parameter.detach().to(dtype, copy=True).requires_grad_()


@torch.no_grad()
def _show(
    model: nn.Module,
    layers: Mapping[str, SparseFeedForward],
    batch: Mapping[str, Any],
    look: _Look,
) -> None:
    """Run the dense model over a batch while `look` sees what each layer gets."""
    device = execution_device(model)
    moved = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in batch.items()}
    mask = moved.get("attention_mask")
    real = mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None
    with _looking(layers, look, real), in_evaluation(model), sparsity(model, feed_forward="dense"):
        model(**{k: v for k, v in moved.items() if k != "labels"})


@contextmanager
def _looking(
    layers: Mapping[str, SparseFeedForward], look: _Look, real: Tensor | None
) -> Iterator[None]:
    def hook_of(name: str) -> Any:
        def hook(layer: SparseFeedForward, given: tuple[Tensor, ...]) -> None:
            x = given[0].detach()
            fits = real is not None and real.shape == x.shape[:-1]
            look(name, layer, x[real] if fits else x.reshape(-1, x.shape[-1]))

        return hook

    handles = [m.register_forward_pre_hook(hook_of(n)) for n, m in layers.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _layers_of(model: nn.Module, caller: str) -> dict[str, SparseFeedForward]:
    layers = sparse_layers(model)
    if not layers:
        raise ValueError(
            f"{caller}: expected a model with sparse feed-forward layers, got "
            f"{type(model).__name__} without any. Call sparsify_feed_forward(model) first"
        )
    return layers
