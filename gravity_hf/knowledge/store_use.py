"""Beliefs of a store on its model, for the length of a `with` block."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .bank import DeltaBank
from .belief import Belief
from .delta import LowRankDelta

if TYPE_CHECKING:
    from .store_reader import StoreReader


@contextmanager
def activated(model: nn.Module, beliefs: Sequence[Belief]) -> Iterator[None]:
    """The sum of the beliefs' deltas in every row: linear maps through peft's layers, blocks
    through hooks. Sorted by id, each once, so that the order given changes no bit."""
    ordered = [belief for _, belief in sorted({b.id: b for b in beliefs}.items())]
    with ExitStack() as stack:
        for kind in sorted({belief.delta.kind for belief in ordered}):
            deltas = [belief.delta for belief in ordered if belief.delta.kind == kind]
            total = type(deltas[0]).sum(deltas)
            stack.enter_context(_applied(model, total))
        yield


@contextmanager
def _applied(model: nn.Module, delta: LowRankDelta) -> Iterator[None]:
    if delta.kind == "low_rank":
        from .peft_adapters import adapted

        with adapted(model, delta):
            yield
    else:
        # peft has no layer for a block's output.
        bank = DeltaBank(model)
        bank.add("all", delta)
        with bank.routed([["all"]]):
            yield


def compiled(model: nn.Module, beliefs: Sequence[Belief], dtype: torch.dtype | None) -> DeltaBank:
    """A bank of the beliefs' deltas, by id."""
    bank = DeltaBank(model, dtype=dtype)
    for belief in beliefs:
        bank.add(belief.id, belief.delta)
    return bank


@contextmanager
def routed(
    store: StoreReader, router: Any, texts: Sequence[str], bank: DeltaBank | None
) -> Iterator[list[list[str]]]:
    """See `BeliefStore.routed`."""
    rows = [list(row) for row in router.rows(texts)]
    if bank is None:
        needed = sorted({belief_id for row in rows for belief_id in row})
        bank = compiled(store.model, [store.by_id(belief_id) for belief_id in needed], None)
    with bank.routed(rows):
        yield rows
