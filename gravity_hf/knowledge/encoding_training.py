"""Training of many deltas at once, each with its own rows, optimiser state and end."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..layers.modes import in_evaluation
from .bank import DeltaBank
from .delta import LowRankDelta
from .encoding_bundle import OwnedRow, bundled
from .encoding_config import EncodingConfig
from .encoding_losses import squared_norm
from .fact_rows import FactRow
from .facts import Fact
from .subject_keys import MapStates, generic_inputs, initial_A

# A short second moment: few steps are made, and the first are unlike the last.
_BETAS = (0.9, 0.99)
_LARGEST_GAIN = 10.0
# Name of a map -> orthonormal columns [in, k] and [out, k] that A and B stay orthogonal to.
Projector = Callable[[str], tuple[Tensor | None, Tensor | None]]


@dataclass(frozen=True)
class DeltaJob:
    """One delta to be trained.

    Args:
        names: of the maps it is on.
        rows: of one fact or of several: prompts with answers, and prompts that must not change.
    """

    names: tuple[str, ...]
    rows: tuple[FactRow, ...]


@dataclass(frozen=True)
class TrainedDelta:
    """A delta, the steps it took, and whether it reached the margin."""

    delta: LowRankDelta
    steps: int
    converged: bool


def train_deltas(
    model: nn.Module,
    tokenizer: Any,
    jobs: Sequence[DeltaJob],
    config: EncodingConfig,
    *,
    projector: Projector | None = None,
    progress: bool = True,
) -> list[TrainedDelta]:
    """Train the deltas of `jobs`, `config.batch_facts` at once.

    The base is in evaluation and without gradients meanwhile; modes and `requires_grad` are as
    before afterwards, also after an error.
    """
    results: list[TrainedDelta] = []
    bar = tqdm(total=len(jobs), desc="encoding", unit="delta", disable=not progress)
    with (
        bar,
        in_evaluation(model),
        _frozen(model),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        names = sorted({name for job in jobs for name in job.names})
        generic = generic_inputs(model, tokenizer, names)
        for start in range(0, len(jobs), config.batch_facts):
            chosen = jobs[start : start + config.batch_facts]
            chunk = _Chunk(model, chosen, config, projector, generic)
            results += chunk.train()
            bar.update(len(results) - start)
    return results


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    needed = [p for p in model.parameters() if p.requires_grad]
    for parameter in needed:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in needed:
            parameter.requires_grad_(True)


class _Chunk:
    """Jobs trained side by side."""

    def __init__(
        self,
        model: nn.Module,
        jobs: Sequence[DeltaJob],
        config: EncodingConfig,
        projector: Projector | None,
        generic: Mapping[str, Tensor],
    ) -> None:
        self.config = config
        names = sorted({name for job in jobs for name in job.names})
        self.projections = {name: _projection(projector, name) for name in names}
        rows = [own for i, job in enumerate(jobs) for own in _owned(job, i, config)]
        self.bundles = bundled(model, names, rows)
        self.factors = self._begin(model, jobs, generic)
        self.bank = DeltaBank(model, trainable=True)
        for i, factors in enumerate(self.factors):
            sizes = {name: _row_sizes(A) for name, (A, _) in factors.items()}
            self._project(i)
            for name, (A, _) in factors.items():
                # What a projection leaves of a key is small where another delta has one like it.
                A.data *= (sizes[name] / _row_sizes(A)).clamp(max=_LARGEST_GAIN)
            self.bank.add(str(i), LowRankDelta(factors))
        self.steps = [0] * len(jobs)
        self.open = set(range(len(jobs)))

    def train(self) -> list[TrainedDelta]:
        """Steps until all have their margin, or have had as many as they may."""
        with self.bank:  # its hooks are needed in the backward pass, too, if layers run again there
            self._descend(torch.optim.Adam(self._groups(), betas=_BETAS))
        return [self._result(i) for i in range(len(self.factors))]

    def _descend(self, optimizer: torch.optim.Optimizer) -> None:
        for _ in range(self.config.steps):
            optimizer.zero_grad()
            self._close(self._backward())
            if not self.open:
                break
            # Deltas that are done have no gradient now, which Adam passes over.
            optimizer.step()
            for i in self.open:
                self.steps[i] += 1
                self._project(i)
        else:
            with torch.no_grad():
                self._close(self._backward())

    def _begin(
        self, model: nn.Module, jobs: Sequence[DeltaJob], generic: Mapping[str, Tensor]
    ) -> list[dict[str, tuple[nn.Parameter, nn.Parameter]]]:
        seen: list[dict[FactRow, dict[str, MapStates]]] = [{} for _ in jobs]
        for bundle in self.bundles:
            for own, states in bundle.states():
                seen[own.owner][own.row] = states
        return [
            {name: _first_pair(job, name, generic[name], own, self.config) for name in job.names}
            for job, own in zip(jobs, seen, strict=True)
        ]

    def _groups(self) -> list[dict[str, Any]]:
        """Parameters with their learning rates: each `A` moves in proportion to its size."""
        pairs = [pair for own in self.factors for pair in own.values()]
        rate = self.config.learning_rate
        sizes = [float(A.detach().square().mean().sqrt()) for A, _ in pairs]
        groups: list[dict[str, Any]] = [{"params": [B for _, B in pairs], "lr": rate}]
        return groups + [
            {"params": [A], "lr": rate * size} for (A, _), size in zip(pairs, sizes, strict=True)
        ]

    def _backward(self) -> dict[int, float]:
        """Gradients of all open deltas, and the smallest margin of each."""
        margins = dict.fromkeys(sorted(self.open), float("inf"))
        for bundle in self.bundles:
            measures = bundle.measure(self.bank, self.open, self.config.gradient_checkpointing)
            if measures is None:
                continue
            if torch.is_grad_enabled():
                measures.losses.sum().backward()
            for owner, margin in zip(measures.owners, measures.margins.tolist(), strict=True):
                margins[owner] = min(margins[owner], margin)
        if self.config.norm_penalty and torch.is_grad_enabled():
            norms = [squared_norm(self.factors[i]).cpu() for i in sorted(self.open)]
            (self.config.norm_penalty * torch.stack(norms).sum()).backward()
        return margins

    def _close(self, margins: dict[int, float]) -> None:
        """End the deltas that have their margin, as they are."""
        for i, margin in margins.items():
            if margin >= self.config.margin:
                self.open.discard(i)
                for A, B in self.factors[i].values():
                    A.grad = B.grad = None

    def _project(self, i: int) -> None:
        with torch.no_grad():
            for name, (A, B) in self.factors[i].items():
                P_in, P_out = self.projections[name]
                if P_in is not None:
                    A -= (A @ P_in.to(A)) @ P_in.to(A).mT
                if P_out is not None:
                    B -= P_out.to(B) @ (P_out.to(B).mT @ B)

    def _result(self, i: int) -> TrainedDelta:
        pairs = {n: (A.detach().cpu(), B.detach().cpu()) for n, (A, B) in self.factors[i].items()}
        return TrainedDelta(LowRankDelta(pairs), self.steps[i], i not in self.open)


def _owned(job: DeltaJob, owner: int, config: EncodingConfig) -> list[OwnedRow]:
    """The rows with their weights: means over a job's prompts of either kind."""
    asked = sum(row.answer > 0 for row in job.rows)
    answer, change = 1 / max(asked, 1), config.locality / max(len(job.rows) - asked, 1)
    return [OwnedRow(row, owner, answer if row.answer else change) for row in job.rows]


def _row_sizes(A: Tensor) -> Tensor:
    return A.detach().square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)


def _projection(projector: Projector | None, name: str) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if projector is None else projector(name)


def _first_pair(
    job: DeltaJob,
    name: str,
    generic: Tensor,
    seen: Mapping[FactRow, Mapping[str, MapStates]],
    config: EncodingConfig,
) -> tuple[nn.Parameter, nn.Parameter]:
    """`A` of the subjects' keys, with noise of the seed; `B` zero: nothing changes yet."""
    keys: dict[Fact, list[Tensor]] = {}
    others, outputs = [generic], []
    for row in job.rows:
        states = seen[row][name]
        if row.answer:
            keys.setdefault(row.fact, []).append(states.x[row.key])
            outputs.append(states.y[row.key])
        else:
            others.append(states.x)
    each = torch.stack([torch.stack(own).mean(0) for own in keys.values()])
    size = float(torch.stack(outputs).square().mean().sqrt())
    noise = torch.randn(config.rank, each.shape[1], generator=_generator(job, name, config))
    A = initial_A(each, torch.cat(others), size, config.rank, noise)
    B = torch.zeros(outputs[0].shape[0], config.rank, device=A.device)
    return nn.Parameter(A), nn.Parameter(B)


def _generator(job: DeltaJob, name: str, config: EncodingConfig) -> torch.Generator:
    """Of the job's own text, so that company changes nothing."""
    text = "\n".join([str(config.seed), name, *(repr(row.ids) for row in job.rows)])
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(seed)
