"""Many low-rank deltas beside one frozen model, each row of a batch with its own.

The base keeps its modules, parameters and state dict: what is added is one forward hook for each
targeted linear map, which looks up the rows of the request that it runs in (`bank_routing`).
Rows without deltas, and calls outside `routed`, give the bits of the base.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..integration.placement import execution_device
from .bank_routing import (
    Route,
    RowGroup,
    Weighted,
    canonical_rows,
    hooked,
    innermost,
    routing,
)
from .delta import LowRankDelta
from .errors import DuplicateKeyError, UnknownKeyError, ValidationError
from .targets import base_model


class DeltaBank:
    """Deltas by id, and the hooks that apply them to the rows that ask for them.

        bank = DeltaBank(model)
        bank.add("a", delta)
        with bank.routed([["a"], [], ["a", "b"]]):      # a batch of three
            model.generate(**inputs)

    Safe to share between threads: a route belongs to the thread or task that opened it and keeps
    its deltas while others add and remove. A thread started inside `routed` has no route of its
    own; open it there.

    Args:
        model: a causal LM; gravity-patched, quantised or wrapped by peft or not.
        dtype: of the stored factors; None keeps each delta's. They are applied in float32.
        trainable: keep the very tensors given to `add`, so that gradients reach them.
    """

    def __init__(
        self, model: nn.Module, *, dtype: torch.dtype | None = None, trainable: bool = False
    ) -> None:
        self._model = base_model(model)
        self._dtype = dtype
        self._trainable = trainable
        self._deltas: dict[str, LowRankDelta] = {}
        self._handles: dict[str, RemovableHandle] = {}
        self._lock = threading.RLock()
        self._is_attached = False  # until `detach`
        self._users = 0  # open `with` blocks

    def add(self, belief_id: str, delta: LowRankDelta) -> None:
        """Store `delta` on the devices of the modules that it is for.

        Raises:
            DuplicateKeyError: there is one of this id.
            IncompatibleBaseError, UnsafeFileError: see `LowRankDelta.check`.
            ValidationError: a module inside a mixture of experts, whose tokens are not in rows.
        """
        delta.check(self._model)
        for name in delta.factors:
            _refuse_expert(name)
        stored = delta if self._trainable else self._placed(delta)
        with self._lock:
            if belief_id in self._deltas:
                raise DuplicateKeyError(
                    f"bank: expected an id that it does not have, got {belief_id!r}. Remove the "
                    "older one first"
                )
            self._deltas[belief_id] = stored
            self._hook_as_needed()

    def remove(self, belief_id: str) -> None:
        """Forget a delta; open routes keep it to their end.

        Raises:
            UnknownKeyError: there is none of this id.
        """
        with self._lock:
            self._known([belief_id])
            del self._deltas[belief_id]
            self._hook_as_needed()

    def ids(self) -> list[str]:
        """Ids of the deltas, sorted."""
        return sorted(self._deltas)

    def __len__(self) -> int:
        return len(self._deltas)

    def __contains__(self, belief_id: object) -> bool:
        return belief_id in self._deltas

    def __getitem__(self, belief_id: str) -> LowRankDelta:
        """The delta of an id. UnknownKeyError where there is none."""
        return self._known([belief_id])[belief_id]

    def nbytes(self) -> int:
        """What the factors take, in bytes."""
        return sum(delta.nbytes() for delta in list(self._deltas.values()))

    def attach(self) -> None:
        """Keep the hooks on the model between routes, too: cheaper for many short ones."""
        with self._lock:
            self._is_attached = True
            self._hook_as_needed()

    def detach(self) -> None:
        """Leave no hook on the model, except those that open routes use until they close."""
        with self._lock:
            self._is_attached = False
            self._hook_as_needed()

    def __enter__(self) -> DeltaBank:
        with self._lock:
            self._users += 1
            self._hook_as_needed()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._users -= 1
            self._hook_as_needed()

    @contextmanager
    def routed(
        self,
        rows: Sequence[str] | Sequence[Sequence[str]],
        weights: Sequence[float] | Sequence[Sequence[float]] | None = None,
        *,
        positions: Tensor | None = None,
    ) -> Iterator[None]:
        """Calls of the model inside add to each row the sum of its deltas.

        Args:
            rows: one entry for each row of the batch: an id or several, none for the base. A batch
                may hold each row several times, side by side, as `generate` lays out beams; one
                entry therefore serves a batch of any size.
            weights: of the deltas, in the form of `rows`; all 1 by default.
            positions: bool `[len(rows), T]`, the tokens to add to, for forward calls on T tokens.

        Raises:
            UnknownKeyError: an id that the bank does not have.
            ValidationError: see `bank_routing.canonical_rows`; and, from the model's call, a batch
                that is no multiple of `rows`.
        """
        route = self._route(canonical_rows(rows, weights), positions)
        with self, routing(self, route):
            yield

    def unrouted(self) -> AbstractContextManager[None]:
        """Calls inside are those of the base, also within `routed`."""
        return routing(self, None)

    def _route(self, rows: list[list[Weighted]], positions: Tensor | None) -> Route:
        if positions is not None and (positions.ndim != 2 or len(positions) != len(rows)):
            raise ValidationError(
                f"positions: expected a mask [{len(rows)}, T], got {list(positions.shape)}"
            )
        with self._lock:
            deltas = self._known([name for row in rows for name, _ in row])
        names = sorted({module for delta in deltas.values() for module in delta.factors})
        # Under inference mode a route could not be used for training later.
        with torch.inference_mode(False), torch.set_grad_enabled(self._trainable):
            groups = {module: _groups(module, rows, deltas) for module in names}
        return Route(len(rows), groups, None if positions is None else positions.bool())

    def _known(self, ids: Sequence[str]) -> dict[str, LowRankDelta]:
        unknown = sorted(set(ids).difference(self._deltas))
        if unknown:
            raise UnknownKeyError(
                f"bank: expected ids of its {len(self._deltas)} deltas, got {unknown[0]!r}. See "
                "ids() for those that it has"
            )
        return {name: self._deltas[name] for name in ids}

    def _placed(self, delta: LowRankDelta) -> LowRankDelta:
        """A copy beside the modules: nobody else can change it."""
        placed = {}
        for name, (A, B) in delta.factors.items():
            device = map_device(self._model.get_submodule(name))
            pair = [x.detach().to(device, self._dtype or x.dtype, copy=True) for x in (A, B)]
            placed[name] = (pair[0], pair[1])
        return LowRankDelta(placed)

    def _hook_as_needed(self) -> None:
        """Hooks on the modules of all deltas while somebody may call, none otherwise."""
        in_use = self._is_attached or self._users > 0
        needed = {m for delta in self._deltas.values() for m in delta.factors} if in_use else set()
        if self._users:
            needed |= set(self._handles)  # an open route may still hold a removed delta
        for name in set(self._handles) - needed:
            self._handles.pop(name).remove()
        for name in sorted(needed - set(self._handles)):
            self._handles[name] = hooked(self, name, self._model.get_submodule(name))


def _groups(
    module: str, rows: list[list[Weighted]], deltas: Mapping[str, LowRankDelta]
) -> list[RowGroup]:
    """Rows by their total rank at `module`, so that none is padded to the rank of another."""
    by_rank: dict[int, list[int]] = {}
    parts: list[list[tuple[Tensor, Tensor]]] = []
    for position, row in enumerate(rows):
        held = [(deltas[name], w) for name, w in row if module in deltas[name].factors]
        parts.append([_scaled(*delta.factors[module], w) for delta, w in held])
        rank = sum(A.shape[0] for A, _ in parts[-1])
        if rank:
            by_rank.setdefault(rank, []).append(position)
    return [_stacked(rank, chosen, parts) for rank, chosen in sorted(by_rank.items())]


def _scaled(A: Tensor, B: Tensor, weight: float) -> tuple[Tensor, Tensor]:
    """In float32, so that a weight is not rounded to the storage's dtype; B transposed."""
    A, B = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (A, B))
    return A, (B if weight == 1.0 else B * weight).mT


def _stacked(rank: int, chosen: list[int], parts: list[list[tuple[Tensor, Tensor]]]) -> RowGroup:
    pairs = [pair for position in chosen for pair in parts[position]]
    A, B = (torch.cat([pair[i] for pair in pairs]) for i in range(2))
    index = torch.tensor(chosen, device=A.device)
    shape = (len(chosen), rank, -1)
    return RowGroup(index, A.reshape(shape), B.reshape(shape))


def map_device(module: nn.Module) -> torch.device:
    """Where a map computes: under what peft wrapped around it, and also when it is offloaded."""
    return execution_device(innermost(module)) or torch.device("cpu")


def _refuse_expert(name: str) -> None:
    if "experts" in name.split("."):
        raise ValidationError(
            f"bank: expected maps that see whole rows, got {name}: an expert sees tokens of many "
            "rows at once. Choose other targets"
        )
