"""Text and chats made into examples to train and to validate on.

Documents are split first, then tokenized, then packed, so that none is on both sides. Every step is
cached by `datasets` under a key made of the documents, the tokenizer and the settings. On several
processes of one machine let the first one work: `with training_arguments.main_process_first():`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, Features, Value
from transformers import PreTrainedTokenizerBase

from .data_arguments import DataArguments
from .documents import (
    Documents,
    cache_key,
    chat_file_documents,
    embedded_documents,
    hub_documents,
    quiet_bars,
    text_file_documents,
)
from .examples import ExampleMaker, describe_counts, digest_of
from .packing import Collator
from .tokenizing import Tokenizing

__all__ = ["DataArguments", "PreparedData", "prepare_data"]

# Part of the cache key of the split: raise it when the split changes.
_VERSION = 1


@dataclass(frozen=True)
class PreparedData:
    """Examples, and how to batch them.

    `train`, `validation`: map-style, in torch format, with `input_ids`, `labels` and, for packing
    "documents", `position_ids`; `validation` is None where nothing is held out. `collator`: for
    `Trainer(data_collator=...)`. `description`: one line with source and counts. `digest`: the same
    for the same examples, on every machine: compare it before resuming.
    """

    train: Dataset
    validation: Dataset | None
    collator: Collator
    description: str
    digest: str


def prepare_data(
    tokenizer: PreTrainedTokenizerBase,
    arguments: DataArguments,
    *,
    max_positions: int | None = None,
    vocabulary: int | None = None,
    labels: bool = True,
) -> PreparedData:
    """Documents from the source of `arguments`, split, tokenized and packed. Deterministic.

    Documents come in an order drawn from `arguments.seed` and their content, so that
    `max_train_tokens` takes a fair sample; equal documents are always on the same side, and a
    document that is validated on is never trained on.

    Args:
        tokenizer: the model's. A begin token is put before each text where the tokenizer does so,
            the end token (or separator) after it. Chats are what its template makes of them.
        arguments: see `DataArguments`.
        max_positions: the longest input the model takes.
        vocabulary: number of the model's embeddings, to check token ids against.
        labels: False leaves labels out, for models that only read (encoders): each text is then cut
            at `length` with the tokenizer's own special tokens; needs packing "none".

    Raises:
        ValueError: sources, lengths, chats or ids that do not fit; with file and line where a file
            is at fault.
    """
    _check_length(arguments, max_positions, labels)
    source = _load(arguments)
    train, validation, dropped = _split(source, arguments)
    tokenizing = Tokenizing(tokenizer, arguments.length, arguments.chat_loss, labels)
    maker = ExampleMaker(tokenizing, arguments, vocabulary)
    train_rows = maker.rows(train, arguments.max_train_tokens, "train")
    validation_rows = None
    if validation is not None:
        validation_rows = maker.rows(validation, arguments.max_validation_tokens, "validation")
    note = f", {dropped} of them also validated on and left out" if dropped else ""
    counts = f"{describe_counts(train_rows)} to train{note}"
    if validation_rows is not None:
        counts += f", {describe_counts(validation_rows)} to validate"
    if maker.unanswered:
        counts += f"; chats left out, no answer in their first {arguments.length} tokens: "
        counts += str(maker.unanswered)
    return PreparedData(
        train=train_rows,
        validation=validation_rows,
        collator=Collator(tokenizing.padding, arguments.packing == "none"),
        description=f"{source.origin}; {counts}; packing {arguments.packing}",
        digest=digest_of(train_rows, validation_rows),
    )


def _check_length(arguments: DataArguments, max_positions: int | None, labels: bool) -> None:
    if max_positions is not None and arguments.length > max_positions:
        raise ValueError(
            f"length: expected at most {max_positions} tokens, the longest input of the model, got "
            f"{arguments.length}. Lower length"
        )
    if not labels and arguments.packing != "none":
        raise ValueError(
            f"packing: expected 'none' for a model that only reads, got {arguments.packing!r}"
        )


def _load(arguments: DataArguments) -> Documents:
    """The documents, with those to validate on where the arguments name them."""
    share = arguments.validation_share
    named = arguments.validation_files or arguments.dataset_validation_split
    if arguments.dataset:
        where = (arguments.dataset, arguments.dataset_config)
        found = hub_documents(*where, arguments.dataset_split, arguments.text_column)
        if arguments.dataset_validation_split:
            split = arguments.dataset_validation_split
            held_out = hub_documents(*where, split, arguments.text_column)
            return Documents(found.train, held_out.train, f"{found.origin}, and split {split}")
    elif arguments.text_files:
        share = 0.0 if named else share
        found = text_file_documents(arguments.text_files, arguments.text_unit, share)
    elif arguments.chat_files:
        found = chat_file_documents(arguments.chat_files)
    else:
        found = embedded_documents(arguments.text_unit)
    if not arguments.validation_files:
        return found
    if "messages" in found.train.column_names:
        held_out = chat_file_documents(arguments.validation_files)
    else:
        held_out = text_file_documents(arguments.validation_files, arguments.text_unit, 0.0)
    return Documents(found.train, held_out.train, f"{found.origin}; validated on {held_out.origin}")


def _split(source: Documents, arguments: DataArguments) -> tuple[Dataset, Dataset | None, int]:
    """The documents of both sides, and how many were left out of the first for being in both."""
    if not len(source.train):
        raise ValueError(f"data: expected documents with text, got none from {source.origin}")
    keys = _keys(source.train, arguments.seed)
    order = np.argsort(keys, kind="stable")
    if source.validation is not None:
        shared = np.isin(keys[order], _keys(source.validation, arguments.seed))
        return source.train.select(order[~shared]), source.validation, int(shared.sum())
    if not arguments.validation_share:
        return source.train.select(order), None, 0
    distinct = np.unique(keys)
    if len(distinct) < 2:
        raise ValueError(
            f"validation_share: expected at least 2 different documents to hold one out, got "
            f"{len(distinct)}. Give more of them or validation_files, or set validation_share to 0"
        )
    wanted = round(arguments.validation_share * len(distinct))
    last = distinct[min(max(wanted, 1), len(distinct) - 1) - 1]
    held_out = keys[order] <= last
    return source.train.select(order[~held_out]), source.train.select(order[held_out]), 0


def _keys(documents: Dataset, seed: int) -> np.ndarray:
    """A number for each document, made of its content and the seed; equal for equal documents."""
    column = "messages" if "messages" in documents.column_names else "text"

    def key(content: Any) -> int:
        text = f"{seed}\0{json.dumps(content, sort_keys=True)}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big", signed=True)

    with quiet_bars():
        keyed = documents.map(
            lambda batch: {"key": [key(content) for content in batch[column]]},
            batched=True,
            remove_columns=documents.column_names,
            features=Features({"key": Value("int64")}),
            new_fingerprint=cache_key(documents._fingerprint, "keys", seed, _VERSION),
            desc="split",
        )
    return keyed.data.column("key").to_numpy()
