"""Documents to examples: tokenized as far as they are needed, packed, counted, digested."""

from __future__ import annotations

import hashlib
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as compute
from datasets import Dataset, Features, Value

from .data_arguments import DataArguments
from .documents import cache_key, quiet_bars
from .packing import Row, make_packer
from .tokenizing import Batch, Tokenizing, tokenizer_identity

# Part of every cache key here: raise it when tokenizing or packing changes.
_VERSION = 1
# How many documents are tokenized first under a limit; twice as many each time after that.
_FIRST_DOCUMENTS = 64
_AT_ONCE = 256


class ExampleMaker:
    """Makes rows of documents. `vocabulary`: ids must be below it; None checks nothing."""

    def __init__(
        self, tokenizing: Tokenizing, arguments: DataArguments, vocabulary: int | None
    ) -> None:
        self._tokenizing, self._arguments, self._vocabulary = tokenizing, arguments, vocabulary
        self._settings = (_VERSION, tokenizer_identity(tokenizing.tokenizer), tokenizing.settings)
        # Chats whose answers all lie beyond `length`; packers leave them out.
        self.unanswered = 0

    def rows(self, documents: Dataset, limit: int | None, side: str) -> Dataset:
        """Examples of at most `limit` tokens in all; `side` names them in errors."""
        tokens = self._tokens(documents, limit)
        if tokens is not None:
            self.unanswered += _count_unlearnt(tokens)
        rows = self._packed(tokens, limit) if tokens is not None else None
        if rows is None or not len(rows):
            found = token_count(tokens, "ids") if tokens is not None else 0
            raise ValueError(
                f"{side} data: expected text for at least one example of {self._arguments.length} "
                f"tokens, got {found} tokens in {len(documents)} document(s). Give more text or "
                "lower length; packing documents or none takes shorter ones, too"
            )
        return rows.with_format("torch")

    def _tokens(self, documents: Dataset, limit: int | None) -> Dataset | None:
        parts: list[Dataset] = []
        start, count = 0, 0
        size = len(documents) if limit is None else _FIRST_DOCUMENTS
        while start < len(documents) and (limit is None or count < limit):
            chosen = documents.select(range(start, min(start + size, len(documents))))
            key = cache_key(chosen._fingerprint, "tokens", *self._settings)
            with quiet_bars():
                part = chosen.map(
                    self._tokenizing,
                    batched=True,
                    batch_size=_AT_ONCE,
                    remove_columns=chosen.column_names,
                    features=Features({"ids": [Value("int32")], "learnt": [Value("bool")]}),
                    new_fingerprint=key,
                    desc="tokenize",
                )
            self._check_ids(part)
            parts.append(part)
            count += token_count(part, "ids")
            start, size = start + size, 2 * size
        return datasets.concatenate_datasets(parts) if parts else None

    def _check_ids(self, tokens: Dataset) -> None:
        largest = compute.max(compute.list_flatten(tokens.data.column("ids"))).as_py() or 0
        if self._vocabulary is not None and largest >= self._vocabulary:
            raise ValueError(
                f"tokenizer: expected token ids below {self._vocabulary}, the model's vocabulary, "
                f"got {largest} from {type(self._tokenizing.tokenizer).__name__}. Use the model's "
                "own tokenizer"
            )

    def _packed(self, tokens: Dataset, limit: int | None) -> Dataset:
        packing = self._arguments.packing
        names = ["input_ids"]
        if self._tokenizing.labels:
            names += ["labels", "position_ids"] if packing == "documents" else ["labels"]
        key = cache_key(tokens._fingerprint, *self._settings, packing, limit, names)
        with quiet_bars():
            return tokens.map(
                _Packing(self._arguments, self._tokenizing.padding, len(tokens), limit, names),
                batched=True,
                batch_size=_AT_ONCE,
                with_indices=True,
                remove_columns=tokens.column_names,
                features=Features({name: [Value("int32")] for name in names}),
                new_fingerprint=key,
                desc="pack",
            )


class _Packing:
    """A packer as `datasets.map` calls it: batch by batch, in order, the last one known."""

    def __init__(
        self,
        arguments: DataArguments,
        padding: int,
        documents: int,
        limit: int | None,
        names: list[str],
    ) -> None:
        self._packer = make_packer(arguments.packing, arguments.length, padding)
        self._last, self._names = documents - 1, names
        self._left = limit

    def __call__(self, batch: Batch, places: list[int]) -> dict[str, list[Any]]:
        rows: list[Row] = []
        for ids, learnt in zip(batch["ids"], batch["learnt"], strict=True):
            rows += self._packer.add(np.array(ids, np.int32), np.array(learnt, bool))
        if places[-1] == self._last:
            rows += self._packer.finish()
        kept = [row for row in rows if self._fits(row)]
        return {name: [row[name] for row in kept] for name in self._names}

    def _fits(self, row: Row) -> bool:
        if self._left is None:
            return True
        self._left -= len(row["input_ids"])
        return self._left >= 0


def _count_unlearnt(tokens: Dataset) -> int:
    """Documents with tokens, but none that the loss counts."""
    column = tokens.data.column("learnt")
    sizes = compute.list_value_length(column).to_numpy()
    learnt = compute.list_flatten(column).to_numpy().astype(np.int64)
    sums = np.concatenate([[0], learnt.cumsum()])
    ends = sizes.cumsum()
    return int(((sums[ends] == sums[ends - sizes]) & (sizes > 0)).sum())


def token_count(rows: Dataset, column: str) -> int:
    """Tokens in all rows of a dataset that was not reordered."""
    return compute.sum(compute.list_value_length(rows.data.column(column))).as_py() or 0


def describe_counts(rows: Dataset) -> str:
    return f"{len(rows):,} examples ({token_count(rows, 'input_ids'):,} tokens)"


def digest_of(*sides: Dataset | None) -> str:
    """A short name for the content of the rows, all columns; the same on every machine."""
    digest = hashlib.sha256()
    for side in sides:
        digest.update(b"side")
        if side is None:
            continue
        for name in sorted(side.column_names):
            digest.update(name.encode())
            column = side.data.column(name)
            # As plain numbers: how Arrow divides a column into chunks is no part of its content.
            for part in (compute.list_value_length(column), compute.list_flatten(column)):
                for chunk in part.chunks:
                    digest.update(chunk.to_numpy(zero_copy_only=False).tobytes())
    return digest.hexdigest()[:16]
