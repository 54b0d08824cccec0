"""Rows of one padded width that are trained on together, and what the base says about them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .bank import DeltaBank
from .encoding_losses import answer_loss, answer_margin, divergence
from .fact_rows import FactRow, padded_width, row_batch, scored_logits
from .layer_reuse import LowerLayers, checkpointed
from .subject_keys import MapStates, recorded


class OwnedRow(NamedTuple):
    """A row, the number of the delta that it trains, and its weight in that delta's loss."""

    row: FactRow
    owner: int
    weight: float


class RowMeasures(NamedTuple):
    """Of some rows: their owners; `losses [n]` with weights; `margins [n]`, infinite where there
    is no answer."""

    owners: list[int]
    losses: Tensor
    margins: Tensor


def bundled(model: nn.Module, names: Sequence[str], rows: Iterable[OwnedRow]) -> list[RowBundle]:
    """The rows by width: a row's padding then does not depend on its company."""
    by_width: dict[int, list[OwnedRow]] = {}
    for row in rows:
        by_width.setdefault(padded_width(row.row), []).append(row)
    return [RowBundle(model, names, own) for _, own in sorted(by_width.items())]


class RowBundle:
    """Rows, read once by the base.

    Args:
        names: of the maps that deltas are on.
    """

    def __init__(self, model: nn.Module, names: Sequence[str], rows: Sequence[OwnedRow]) -> None:
        self._model, self._names, self._rows = model, names, rows
        self._batch = row_batch(model, [own.row for own in rows])
        self._lower = LowerLayers(model, names)
        with torch.no_grad():
            with self._lower.capture(), recorded(model, names) as self._seen:
                logits = scored_logits(model, self._batch)
            # The lower layers are skipped only if that gives the very same logits.
            everything = torch.arange(len(rows))
            with self._lower.reused(everything):
                again = scored_logits(model, self._batch) if self._lower.usable else logits
            if not torch.equal(again, logits):
                self._lower.forget()
            self._before = logits[:, -1].log_softmax(-1)

    def states(self) -> Iterator[tuple[OwnedRow, dict[str, MapStates]]]:
        """Each row, and what the maps get and give at its tokens in the base; once."""
        seen, self._seen = self._seen, {}
        count = len(self._rows)
        # Some models flatten batch and tokens.
        by_row = {
            name: [part.reshape(count, -1, part.shape[-1]) for part in pair]
            for name, pair in seen.items()
        }
        for k, own in enumerate(self._rows):
            start = padded_width(own.row) - len(own.row.fed)
            yield (
                own,
                {
                    name: MapStates(x[k, start:].float(), y[k, start:].float())
                    for name, (x, y) in by_row.items()
                },
            )

    def measure(
        self, bank: DeltaBank, open_owners: set[int], checkpointing: bool
    ) -> RowMeasures | None:
        """Losses of the rows whose owners are open, each with its owner's delta; None without."""
        chosen = [k for k, own in enumerate(self._rows) if own.owner in open_owners]
        if not chosen:
            return None
        rows = [self._rows[k] for k in chosen]
        index = torch.tensor(chosen)
        batch = self._batch.rows(index)
        with (
            bank.routed([str(own.owner) for own in rows]),
            self._lower.reused(index),
            self._layers(checkpointing),
        ):
            log_p = scored_logits(self._model, batch).log_softmax(-1)
        asked = torch.tensor([own.row.answer > 0 for own in rows], device=log_p.device)
        losses = torch.where(
            asked,
            answer_loss(log_p, batch.labels),
            divergence(self._before[index.to(log_p.device)], log_p[:, -1]),
        )
        weights = torch.tensor([own.weight for own in rows], device=log_p.device)
        margins = answer_margin(log_p.detach(), batch.labels)
        return RowMeasures([own.owner for own in rows], losses * weights, margins)

    def _layers(self, checkpointing: bool) -> AbstractContextManager[None]:
        return checkpointed(self._model, self._names) if checkpointing else nullcontext()
