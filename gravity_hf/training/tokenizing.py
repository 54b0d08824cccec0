"""Documents as tokens, in the form that `datasets.map` calls."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from .chat import chat_template, encode_chat

# Longer texts go through the tokenizer in pieces of about this many characters, cut after a line.
_PIECE = 1 << 20

Batch = dict[str, list[Any]]


class Tokenizing:
    """Columns `text` or `messages` to `ids` and `learnt`, what the loss counts.

    Args:
        tokenizer: the model's.
        length: where texts are cut for models that only read, and chats always.
        chat_loss: see `encode_chat`.
        labels: False for models that only read.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, length: int, chat_loss: str, labels: bool
    ) -> None:
        self.tokenizer, self.length = tokenizer, length
        self.chat_loss, self.labels = chat_loss, labels
        self.begin, self.end = _borders(tokenizer)

    @property
    def settings(self) -> tuple[object, ...]:
        """What the tokens depend on besides tokenizer and documents."""
        return (self.length, self.chat_loss, self.labels, self.begin, self.end)

    @property
    def padding(self) -> int:
        """The id that fills rows; it is never learnt, so any will do."""
        known = (self.tokenizer.pad_token_id, *self.end, 0)
        return next(token for token in known if token is not None)

    def __call__(self, batch: Batch) -> Batch:
        if "messages" in batch:
            return self._chats(batch)
        ids = self._texts(batch["text"]) if self.labels else self._whole_texts(batch["text"])
        return {"ids": ids, "learnt": [np.ones(len(row), bool) for row in ids]}

    def _texts(self, texts: list[str]) -> list[NDArray[np.int32]]:
        pieces = [list(text_pieces(text)) for text in texts]
        flat = [piece for parts in pieces for piece in parts]
        encoded = iter(self.tokenizer(flat, add_special_tokens=False, verbose=False)["input_ids"])
        rows = []
        for parts in pieces:
            inner = [np.array(next(encoded), np.int32) for _ in parts]
            rows.append(np.concatenate([self.begin, *inner, self.end]).astype(np.int32))
        return rows

    def _whole_texts(self, texts: list[str]) -> list[NDArray[np.int32]]:
        encoded = self.tokenizer(texts, truncation=True, max_length=self.length, verbose=False)
        return [np.array(ids, np.int32) for ids in encoded["input_ids"]]

    def _chats(self, batch: Batch) -> Batch:
        chats = [
            encode_chat(self.tokenizer, messages, self.chat_loss, where)
            for messages, where in zip(batch["messages"], batch["where"], strict=True)
        ]
        return {
            # The rest of a long chat without its beginning would teach answers to nothing.
            "ids": [chat.ids[: self.length] for chat in chats],
            "learnt": [chat.learnt[: self.length] for chat in chats],
        }


def text_pieces(text: str) -> Iterator[str]:
    """`text` in pieces short enough for any tokenizer; they add up to it."""
    start = 0
    while len(text) - start > _PIECE:
        line_end = text.rfind("\n", start, start + _PIECE) + 1
        end = line_end if line_end > start else start + _PIECE
        yield text[start:end]
        start = end
    yield text[start:]


def tokenizer_identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """The same text for tokenizers that tokenize alike, in every process."""
    if tokenizer.is_fast:
        content = json.loads(tokenizer.backend_tokenizer.to_str())
        # Calls leave their own padding and truncation behind.
        content.pop("padding", None)
        content.pop("truncation", None)
    else:
        content = sorted(tokenizer.get_vocab().items())
    parts = [type(tokenizer).__name__, content, tokenizer.special_tokens_map]
    text = json.dumps([*parts, chat_template(tokenizer)], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _borders(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids before and after each text: what the tokenizer puts first, and its end or separator."""
    added = tokenizer("")["input_ids"]
    first = {tokenizer.bos_token_id, tokenizer.cls_token_id} - {None}
    last = (tokenizer.eos_token_id, tokenizer.sep_token_id)
    begin = added[:1] if added and added[0] in first else []
    end = next(([token] for token in last if token is not None), [])
    return begin, end
