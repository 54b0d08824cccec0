"""Gradients and arithmetic of a model on some rows of its training data, with nothing left behind:
no gradient, no random number, no buffer of the training itself is changed."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainingArguments

from .flop_formulas import flop_counter
from .freezing import Members, flags_kept, freeze_all_but


@dataclass(frozen=True)
class ProbeData:
    """Batches for probes, drawn from the training data by a seed and a step.

    Attributes:
        dataset: the training data; of data without indices the first rows are taken.
        collate: makes rows a batch.
        rows: in a batch of this process.
        seed: of the draw.
        device: where batches go.
        batches: that make up an optimiser step, and so a probe: the gradient of fewer rows is
            larger by its noise alone.
    """

    dataset: Any
    collate: Callable[[Any], Any]
    rows: int
    seed: int
    device: torch.device
    batches: int = 1

    @classmethod
    def of(cls, loader: DataLoader, args: TrainingArguments) -> ProbeData:
        """The data and the collator of Trainer's loader."""
        return cls(
            loader.dataset,
            loader.collate_fn,
            rows=args.train_batch_size,
            seed=args.seed,
            device=args.device,
            batches=args.gradient_accumulation_steps,
        )

    def batch(self, step: int, number: int = 0) -> dict[str, Any]:
        """Rows drawn for `step`, the same whenever they are asked for; of these the `number`-th
        batch, which is another in every process."""
        # Every dataset of torch has __getitem__; one to iterate over raises there.
        indexed = hasattr(self.dataset, "__getitem__") and hasattr(self.dataset, "__len__")
        if not indexed or isinstance(self.dataset, IterableDataset):
            rows: Any = list(itertools.islice(iter(self.dataset), self.rows))
        else:
            draw = torch.Generator().manual_seed(self.seed + step)
            rank, processes = _place()
            shape = (self.batches, processes, self.rows)
            drawn = torch.randint(len(self.dataset), shape, generator=draw)
            chosen = drawn[number, rank].tolist()
            many = getattr(self.dataset, "__getitems__", None)
            rows = many(chosen) if many is not None else [self.dataset[i] for i in chosen]
        return _moved(self.collate(rows), self.device)


@contextmanager
def nothing_left(model: nn.Module, seed: int) -> Iterator[None]:
    """Random numbers from `seed` inside; afterwards those of before go on, and gradients, flags and
    buffers of `model` are as they were. Training mode inside."""
    buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        with torch.random.fork_rng(random_devices(model)), flags_kept(model):
            torch.manual_seed(seed)
            model.train()
            yield
    finally:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        for module, training in modes:
            module.training = training


def random_devices(model: nn.Module) -> list[torch.device]:
    """Whose random numbers a forward takes, besides the CPU's: for `fork_rng`."""
    first = next(model.parameters(), None)
    return [first.device] if first is not None and first.device.type == "cuda" else []


def probe_gradients(
    model: nn.Module, members: Members, wanted: set[str], data: ProbeData, step: int
) -> dict[str, float]:
    """Root mean square gradients of the groups `wanted` over as many rows as an optimiser step has,
    by backward passes in which no other weight gets a gradient; 0 where the loss does not reach a
    group.

    Raises:
        ValueError: the model gives no loss on the batch.
    """
    chosen = {name: members[name] for name in sorted(wanted)}
    with nothing_left(model, data.seed + step):
        freeze_all_but(members, wanted)
        gradients = _gradients(loss_of(model, data.batch(step)), chosen)
        for number in range(1, data.batches):
            more = _gradients(loss_of(model, data.batch(step, number)), chosen)
            gradients = [_sum(one, other) for one, other in zip(gradients, more, strict=True)]
    return _rms(chosen, gradients, data.batches)


def backward_flops(
    model: nn.Module, members: Members, wanted: set[str], data: ProbeData
) -> tuple[int, int]:
    """(forward, backward): floating-point operations of matrix products, convolutions and torch's
    fused attention on one batch, counted while they run; of a kernel of one's own none is known."""
    with nothing_left(model, data.seed):
        freeze_all_but(members, wanted)
        batch = data.batch(0)
        with flop_counter() as forward:
            loss = loss_of(model, batch)
        with flop_counter() as backward:
            _gradients(loss, {name: members[name] for name in wanted})
    return forward.get_total_flops(), backward.get_total_flops()


def loss_of(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """The loss that the model itself gives.

    Raises:
        ValueError: it gives none.
    """
    output = model(**batch)
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        raise ValueError(
            f"GovernedTraining: expected a loss from {type(model).__name__} on a training batch, "
            f"got {loss!r} with the keys {sorted(batch)}. Governed training probes the model by "
            "itself: give it batches with labels"
        )
    return loss


def _gradients(loss: Tensor, members: Members) -> list[Tensor | None]:
    """Of all parameters in their order. Not by `backward`, whose hooks tell DDP that these
    parameters are used: in the next step it would wait for them."""
    parameters = [parameter for group in members.values() for parameter in group]
    if not (parameters and loss.requires_grad):
        return [None] * len(parameters)
    return list(torch.autograd.grad(loss, parameters, allow_unused=True))


def _rms(members: Members, gradients: list[Tensor | None], batches: int) -> dict[str, float]:
    """Of sums over batches; one wait for the device."""
    owners = [name for name, parameters in members.items() for _ in parameters]
    pairs = [(n, g) for n, g in zip(owners, gradients, strict=True) if g is not None]
    sizes = {name: sum(p.numel() for p in parameters) for name, parameters in members.items()}
    squares = dict.fromkeys(members, 0.0)
    if pairs:
        norms = torch._foreach_norm([mean_over_processes(gradient) for _, gradient in pairs])
        for (name, _), norm in zip(pairs, torch.stack(list(norms)).double().tolist(), strict=True):
            squares[name] += norm**2
    return {name: math.sqrt(squares[name] / max(size, 1)) / batches for name, size in sizes.items()}


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    if one is None or other is None:
        return one if other is None else other
    return one + other


def _place() -> tuple[int, int]:
    """(rank, processes)."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def mean_over_processes(values: Tensor) -> Tensor:
    """As DDP has it of gradients, so that all of them decide alike."""
    _, processes = _place()
    if processes > 1:
        values = values.contiguous()
        torch.distributed.all_reduce(values)
        values /= processes
    return values


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _moved(item, device) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_moved(item, device) for item in value)
    return value
