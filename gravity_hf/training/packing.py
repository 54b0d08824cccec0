"""Documents of tokens laid into rows of equal length: cut blocks, packed documents, or padding.

A packer is shown one document after the other and gives rows when they are full. A row is a dict of
int32 arrays `[length]`: `input_ids`, `labels` (-100 where nothing is learnt; not shifted, the model
does that) and, where rows hold several documents, `position_ids` that restart at each of them.

The first label of a row and of a document is always -100. It never has a prediction inside the row,
or would be predicted from the document before; counting it would only bias the mean loss.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

IGNORED = -100
# Documents that are looked at together when rows are filled; bounds the memory of packing.
_POOL = 2048

Ids = NDArray[np.int32]
Row = dict[str, Ids]


class Packer(ABC):
    """Base of the three ways. `length`: tokens in a row; `padding`: id that fills what is left."""

    def __init__(self, length: int, padding: int) -> None:
        self.length, self.padding = length, padding

    @abstractmethod
    def add(self, ids: Ids, learnt: NDArray[np.bool_]) -> list[Row]:
        """Take a document, `[tokens]` each; give the rows that it completes."""

    def finish(self) -> list[Row]:
        """The rows that are left when there are no more documents."""
        return []

    def _pieces(self, ids: Ids, learnt: NDArray[np.bool_]) -> list[tuple[Ids, Ids]]:
        """Ids and labels of a document in pieces that fit a row; those that teach nothing go."""
        pieces = []
        for start in range(0, len(ids), self.length):
            part = ids[start : start + self.length]
            labels = _labels(part, learnt[start : start + self.length])
            if (labels != IGNORED).any():
                pieces.append((part, labels))
        return pieces


class BlockPacker(Packer):
    """Documents one after the other, cut every `length` tokens wherever that falls."""

    def __init__(self, length: int, padding: int) -> None:
        super().__init__(length, padding)
        self._ids: list[Ids] = []
        self._learnt: list[NDArray[np.bool_]] = []
        self._waiting = 0

    def add(self, ids: Ids, learnt: NDArray[np.bool_]) -> list[Row]:
        self._ids.append(ids)
        self._learnt.append(learnt)
        self._waiting += len(ids)
        if self._waiting < self.length:
            return []
        tokens, mask = np.concatenate(self._ids), np.concatenate(self._learnt)
        whole = len(tokens) // self.length * self.length
        rows = []
        for start in range(0, whole, self.length):
            part = tokens[start : start + self.length]
            labels = _labels(part, mask[start : start + self.length])
            if (labels != IGNORED).any():
                rows.append({"input_ids": part, "labels": labels})
        self._ids, self._learnt = [tokens[whole:]], [mask[whole:]]
        self._waiting = len(tokens) - whole
        return rows


class DocumentPacker(Packer):
    """Several whole documents in a row, as many as fit: the longest first, each into the fullest
    row that has room. What is left of a row is padding, a document of its own without labels."""

    def __init__(self, length: int, padding: int) -> None:
        super().__init__(length, padding)
        self._pool: list[tuple[Ids, Ids]] = []

    def add(self, ids: Ids, learnt: NDArray[np.bool_]) -> list[Row]:
        self._pool += self._pieces(ids, learnt)
        return self.finish() if len(self._pool) >= _POOL else []

    def finish(self) -> list[Row]:
        pool, self._pool = self._pool, []
        # `free[i]` tokens are left in `rows[i]`; sorted, so that the tightest fit is a bisection.
        free: list[int] = []
        rows: list[list[tuple[Ids, Ids]]] = []
        for piece in sorted(pool, key=lambda piece: len(piece[0]), reverse=True):
            size = len(piece[0])
            place = bisect_left(free, size)
            if place == len(free):
                row, room = [piece], self.length - size
            else:
                row, room = rows.pop(place), free.pop(place) - size
                row.append(piece)
            place = bisect_left(free, room)
            free.insert(place, room)
            rows.insert(place, row)
        return [self._row(row, room) for row, room in zip(rows, free, strict=True)]

    def _row(self, pieces: list[tuple[Ids, Ids]], room: int) -> Row:
        if room:
            padding = np.full(room, self.padding, np.int32), np.full(room, IGNORED, np.int32)
            pieces = [*pieces, padding]
        return {
            "input_ids": np.concatenate([ids for ids, _ in pieces]),
            "labels": np.concatenate([labels for _, labels in pieces]),
            "position_ids": np.concatenate(
                [np.arange(len(ids), dtype=np.int32) for ids, _ in pieces]
            ),
        }


class SingleDocumentPacker(Packer):
    """A document for each row, padded by the collator; a longer one goes on in further rows."""

    def add(self, ids: Ids, learnt: NDArray[np.bool_]) -> list[Row]:
        return [{"input_ids": i, "labels": labels} for i, labels in self._pieces(ids, learnt)]


@dataclass(frozen=True)
class Collator:
    """Batches of examples: int64 `[B, T]` each.

    Padded batches (packing "none") have an `attention_mask`. Packed ones must not: with a mask
    transformers would no longer look for documents in `position_ids`.
    """

    padding: int
    padded: bool

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        if not self.padded:
            names = [n for n in ("input_ids", "labels", "position_ids") if n in examples[0]]
            return {n: torch.stack([torch.as_tensor(e[n]).long() for e in examples]) for n in names}
        masks = [torch.ones(len(example["input_ids"]), dtype=torch.long) for example in examples]
        batch = {
            "input_ids": self._padded(examples, "input_ids", self.padding),
            "attention_mask": _pad(masks, 0),
        }
        if "labels" in examples[0]:
            batch["labels"] = self._padded(examples, "labels", IGNORED)
        return batch

    def _padded(self, examples: Sequence[Mapping[str, Any]], name: str, value: int) -> Tensor:
        return _pad([torch.as_tensor(example[name]).long() for example in examples], value)


def make_packer(packing: str, length: int, padding: int) -> Packer:
    """The packer that `packing` names: blocks, documents or none."""
    kinds = {"blocks": BlockPacker, "documents": DocumentPacker, "none": SingleDocumentPacker}
    return kinds[packing](length, padding)


def require_packable(model: nn.Module) -> None:
    """Raise ValueError if `model` would let packed documents see each other.

    transformers finds the borders of documents in `position_ids`, and only in a call without cache
    and without padding mask. Trainer drops inputs that the model's `forward` does not name.
    """
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if "position_ids" not in inspect.signature(base.forward).parameters:
        raise ValueError(
            f"packing: expected a model that takes position_ids for packing 'documents', "
            f"{type(base).__name__} does not, so documents would see each other. Use packing "
            "'blocks' or 'none'"
        )


def _labels(ids: Ids, learnt: NDArray[np.bool_]) -> Ids:
    labels = np.where(learnt, ids, np.int32(IGNORED))
    labels[0] = IGNORED
    return labels


def _pad(rows: list[Tensor], value: int) -> Tensor:
    return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=value)
