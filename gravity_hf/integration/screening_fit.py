"""Screening that learns from a frozen host: what its dense attention looks at, it shall find."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..layers.modes import in_evaluation
from ..ops.sparse import screening_loss
from .placement import execution_device
from .screening_recall import Recall, RecallObserver
from .sparse_forward import SparseCall, SparseObserver, observe
from .sparse_settings import SparseSettings, sparse_modules

Batches = Iterable[Mapping[str, Any]]

# Batches whose keys the principal directions are those of.
_PRINCIPAL_BATCHES = 4


@dataclass(frozen=True)
class ScreeningReport:
    """`before`, `after`: recall on held-out batches; `losses`: KL in nats of each step, mean over
    layers; `layers`: recall of each attention module's screening, before and after."""

    before: Recall
    after: Recall
    losses: tuple[float, ...]
    layers: dict[str, tuple[float, float]]

    def to_dict(self) -> dict[str, Any]:
        """JSON-able."""
        return {
            "before": self.before._asdict(),
            "after": self.after._asdict(),
            "losses": list(self.losses),
            "layers": {name: list(pair) for name, pair in self.layers.items()},
        }


def fit_screening(
    model: nn.Module,
    batches: Batches,
    *,
    steps: int = 200,
    lr: float = 3e-3,
    rows: int = 64,
    principal: bool = True,
    evaluation: Batches | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> ScreeningReport:
    """Train the projections of a sparse model on what its dense attention looks at.

    They begin with the principal directions of the keys; then a step takes a batch and, in every
    layer, `rows` queries of each sequence, and lowers `KL(weights of dense attention || softmax of
    screening scores)`. The model attends densely meanwhile; only the projections change.

    Args:
        model: after `sparsify_attention(..., screening="learned")`.
        batches: model inputs as dicts of tensors, longer than the budget; taken in turns.
        steps: of AdamW; 0: the principal directions alone.
        lr: falls to 0 along a half cosine.
        rows: queries of each sequence in a step.
        principal: begin with the principal directions; else with what the projections are.
        evaluation: other batches to measure recall on; None: the last of `batches`.
        seed: of the rows that are drawn.
        progress: True or False; None shows a bar on terminals only.

    Raises:
        ValueError: a model without projections, or no batches.
    """
    modules = _projected(model, "fit_screening")
    known = _listed(batches, "fit_screening")
    held_out = known[-1:] if evaluation is None else _listed(evaluation, "fit_screening")
    before, first = recall_by_layer(model, held_out, seed=seed)
    if principal:
        fit_principal(model, known)
    losses = _train(model, modules, known, steps, lr, rows, seed, progress)
    after, last = recall_by_layer(model, held_out, seed=seed)
    layers = {name: (first[name], last[name]) for name in last}
    return ScreeningReport(before, after, tuple(losses), layers)


def fit_principal(model: nn.Module, batches: Batches) -> None:
    """Set the projections of a sparse model to the directions in which its keys vary most, in each
    layer and key-value head.

    Raises:
        ValueError: a model without projections, or no batches.
    """
    modules = _projected(model, "fit_principal")
    known = _listed(batches, "fit_principal")[:_PRINCIPAL_BATCHES]
    seen = {name: _Keys() for name in modules}
    with _observed(modules, seen):
        for batch in known:
            run_dense(model, batch)
    for name, module in modules.items():
        module.screening.fit_principal(*seen[name].all())


def measure_screening(
    model: nn.Module,
    batches: Batches,
    *,
    settings: SparseSettings | None = None,
    rows: int = 256,
    seed: int = 0,
) -> Recall:
    """What a sparse model's choice keeps of its dense attention, beside other choices as large.

    Args:
        model: after `sparsify_attention`; it attends densely meanwhile.
        batches: model inputs as dicts of tensors, longer than the budget.
        settings: other ones than the model's, with its screening.
        rows: queries of each sequence that are looked at.
        seed: of those rows, and of the choice by lot.

    Raises:
        ValueError: a model that is not sparse, or no batches.
    """
    return recall_by_layer(model, batches, settings=settings, rows=rows, seed=seed)[0]


def recall_by_layer(
    model: nn.Module,
    batches: Batches,
    *,
    settings: SparseSettings | None = None,
    rows: int = 256,
    seed: int = 0,
) -> tuple[Recall, dict[str, float]]:
    """As `measure_screening`, and the recall of each attention module's screening by name."""
    modules = sparse_modules(model)
    if not modules:
        raise ValueError(
            f"measure_screening: expected a model made sparse, got {type(model).__name__}, which "
            "is not. Call sparsify_attention(model, budget) first"
        )
    known = _listed(batches, "measure_screening")
    seen = {name: RecallObserver(settings, rows, seed) for name in modules}
    with _observed(modules, seen):
        for batch in known:
            run_dense(model, batch)
    found = {name: observer.recall() for name, observer in seen.items()}
    return Recall.mean(list(found.values())), {n: recall.screening for n, recall in found.items()}


def run_dense(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """One forward pass in evaluation mode without gradients and without a cache."""
    device = execution_device(model)
    inputs = {n: x.to(device) if isinstance(x, Tensor) else x for n, x in batch.items()}
    with in_evaluation(model), torch.no_grad():
        model(**inputs, use_cache=False)


@contextmanager
def _observed(
    modules: Mapping[str, nn.Module], observers: Mapping[str, SparseObserver]
) -> Iterator[None]:
    try:
        for name, module in modules.items():
            observe(module, observers[name])
        yield
    finally:
        for module in modules.values():
            observe(module, None)


def _train(
    model: nn.Module,
    modules: Mapping[str, Any],
    batches: list[Mapping[str, Any]],
    steps: int,
    lr: float,
    rows: int,
    seed: int,
    progress: bool | None,
) -> list[float]:
    """KL in nats of each step, mean over layers."""
    weights = [p for module in modules.values() for p in module.screening.parameters()]
    flags = [p.requires_grad for p in weights]
    optimizer = torch.optim.AdamW(weights, lr=lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(1, steps))
    device = execution_device(model) or torch.device("cpu")
    lesson = _Lesson(rows, torch.Generator(device).manual_seed(seed))
    hidden = None if progress is None else not progress
    losses = []
    try:
        for parameter in weights:
            parameter.requires_grad_(True)
        for step in tqdm(range(steps), desc="fit_screening", unit="step", disable=hidden):
            lesson.losses = []
            with _observed(modules, dict.fromkeys(modules, lesson)):
                run_dense(model, batches[step % len(batches)])
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(torch.stack(lesson.losses).mean())
    finally:
        for parameter, flag in zip(weights, flags, strict=True):
            parameter.requires_grad_(flag)
    return [float(loss) for loss in losses]


class _Lesson:
    """Adds the gradient of each layer's loss as the layer is reached: no graph outlives it."""

    def __init__(self, rows: int, generator: torch.Generator) -> None:
        self.rows, self.generator = rows, generator
        self.losses: list[Tensor] = []

    def see(self, call: SparseCall) -> None:
        with torch.enable_grad():
            module: Any = call.module
            screen_q, screen_k = module.screening(call.query, call.key)
            loss = screening_loss(
                call.query,
                call.key,
                screen_q,
                screen_k,
                call.score,
                mask=call.mask,
                rows=self.rows,
                generator=self.generator,
            )
            loss.backward()
        self.losses.append(loss.detach())


class _Keys:
    """Collects the keys of a layer `[1, G, tokens, dh]`, and which of them are real."""

    def __init__(self) -> None:
        self.keys: list[Tensor] = []
        self.real: list[Tensor] = []

    def see(self, call: SparseCall) -> None:
        key, mask = call.key, call.mask
        is_padding = mask is not None and mask.dim() == 2
        real = mask if is_padding else key.new_ones(key.shape[0], key.shape[2])
        self.keys.append(key.transpose(0, 1).flatten(1, 2)[None])
        self.real.append(real.bool().flatten()[None])  # type: ignore[union-attr]

    def all(self) -> tuple[Tensor, Tensor]:
        return torch.cat(self.keys, 2), torch.cat(self.real, 1)


def _projected(model: nn.Module, caller: str) -> dict[str, Any]:
    modules = sparse_modules(model)
    if not modules or any("screening" not in m._modules for m in modules.values()):
        raise ValueError(
            f"{caller}: expected a model whose screening has projections, got "
            f"{type(model).__name__} without. Call sparsify_attention(model, budget, "
            "screening='learned') first"
        )
    return modules


def _listed(batches: Batches, caller: str) -> list[Mapping[str, Any]]:
    known = list(batches)
    if not known:
        raise ValueError(f"{caller}: expected at least one batch of model inputs, got none")
    return known
