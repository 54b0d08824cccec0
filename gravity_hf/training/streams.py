"""Text as one long row of tokens, and windows of it to train and validate on."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .sources import load_text
from .tokenizers import BYTES, byte_tokenizer, character_tokenizer, tiktoken_tokenizer, train_bpe

# Longer texts are tokenized in pieces of this many characters, so many at a time: as Python's
# numbers the tokens of a whole corpus would take ten times the room.
_PIECE = 1 << 20
_PIECES = 4


@dataclass(frozen=True)
class TokenStream:
    """`train`, `validation`: ids `[tokens]` in the smallest integer type that holds them.

    `bytes_per_token`: of the validation text, UTF-8; `digest`: of the text and the tokenizer.
    """

    train: Tensor
    validation: Tensor
    tokenizer: PreTrainedTokenizerBase
    vocabulary: int
    bytes_per_token: float
    description: str
    digest: str


def load_stream(
    tokenizer: str = "byte",
    text_files: list[str] | None = None,
    dataset: str | None = None,
    dataset_config: str | None = None,
    text_column: str = "text",
    train_bytes: int = 100_000_000,
    validation_bytes: int = 10_000_000,
) -> TokenStream:
    """Tokens of text files, of a dataset, or of the Python standard library's source.

    Args:
        tokenizer: `"byte"`, `"char"`, `"bpe:SIZE"` (trained on the training text),
            `"tiktoken:NAME"` or `"tiktoken:FILE"`, or a folder or Hub name.
        text_files: the last tenth of each is held out for validation.
        dataset: a name of `sources.DATASETS`, or a name or folder for `datasets.load_dataset`; its
            validation or test split is held out, or the last tenth where it has none.
        dataset_config: configuration of that dataset.
        text_column: where the dataset keeps its text.
        train_bytes: at most so much training text, in characters.
        validation_bytes: at most so much validation text, in characters.

    Raises:
        ValueError: two sources at once, a missing file or column, or too little text.
        ImportError: a package that the dataset or the tokenizer needs.
    """
    text = load_text(
        text_files, dataset, dataset_config, text_column, train_bytes, validation_bytes
    )
    return make_stream(tokenizer, text.train, text.validation, description=text.origin)


def make_stream(
    tokenizer: str, train: str, validation: str, description: str = "text"
) -> TokenStream:
    """Tokenize two texts. `tokenizer`: as in `load_stream`."""
    if tokenizer == "byte":
        made, vocabulary = byte_tokenizer(), BYTES
        ids = [_byte_ids(text) for text in (train, validation)]
    else:
        made = _tokenizer(tokenizer, train)
        vocabulary = len(made)
        ids = [_ids(made, text, vocabulary) for text in (train, validation)]
    held_out = len(validation.encode())
    return TokenStream(
        train=ids[0],
        validation=ids[1],
        tokenizer=made,
        vocabulary=vocabulary,
        bytes_per_token=held_out / max(len(ids[1]), 1),
        description=f"{description}; {len(ids[0]):,} tokens to train, {len(ids[1]):,} to validate",
        digest=_digest(tokenizer, train, validation),
    )


class RandomWindows(Dataset):
    """`count` windows of `length` tokens from random places, fixed by `seed`.

    An index gives the same window whatever the model, so runs with one seed see one order of
    batches. `collate` makes model inputs of it.
    """

    def __init__(self, ids: Tensor, count: int, length: int, seed: int) -> None:
        _require_tokens(ids, length + 1)
        generator = torch.Generator().manual_seed(seed)
        self.ids, self.length = ids, length
        self.starts = torch.randint(0, len(ids) - length, (count,), generator=generator)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> Tensor:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> Tensor:
        """`[len(indices), length]`: one gather for a whole batch."""
        places = self.starts[indices][:, None] + torch.arange(self.length)
        return self.ids[places].long()


class ConsecutiveWindows(RandomWindows):
    """At most `count` windows that cover the text from its beginning, evenly spread beyond that."""

    def __init__(self, ids: Tensor, count: int, length: int) -> None:
        _require_tokens(ids, length)
        available = len(ids) // length
        self.ids, self.length = ids, length
        if available <= count:
            self.starts = torch.arange(available) * length
        else:
            self.starts = torch.linspace(0, len(ids) - length, count).long()


def collate(windows: Tensor | list[Tensor]) -> dict[str, Tensor]:
    """Model inputs of a batch of windows; the model itself shifts the labels by one."""
    ids = windows if isinstance(windows, Tensor) else torch.stack(windows)
    return {"input_ids": ids, "labels": ids}


def _tokenizer(name: str, text: str) -> PreTrainedTokenizerBase:
    if name == "char":
        return character_tokenizer(text)
    if name.startswith("bpe:"):
        size = name.removeprefix("bpe:")
        if not size.isdigit():
            raise ValueError(f"--tokenizer: expected bpe:SIZE such as bpe:8192, got {name!r}")
        return train_bpe(text, int(size))
    if name.startswith("tiktoken:"):
        return tiktoken_tokenizer(name.removeprefix("tiktoken:"))
    try:
        return AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            "--tokenizer: expected byte, char, bpe:SIZE, tiktoken:NAME, or the folder or name of a "
            f"tokenizer, got {name!r} ({error})"
        ) from error


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, vocabulary: int) -> Tensor:
    kind = torch.int16 if vocabulary < 2**15 else torch.int32
    found = []
    for start in range(0, len(text), _PIECES * _PIECE):
        ends = range(start, min(start + _PIECES * _PIECE, len(text)), _PIECE)
        pieces = [text[i : i + _PIECE] for i in ends]
        encoded = tokenizer(pieces, add_special_tokens=False, return_attention_mask=False)
        found += [torch.tensor(ids, dtype=kind) for ids in encoded["input_ids"]]
    return torch.cat(found) if found else torch.empty(0, dtype=kind)


def _byte_ids(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for number, part in enumerate(parts):
        digest.update(b"\0" if number else b"")
        for start in range(0, len(part), _PIECE):
            digest.update(part[start : start + _PIECE].encode())
    return digest.hexdigest()[:16]


def _require_tokens(ids: Tensor, least: int) -> None:
    if len(ids) < least:
        raise ValueError(
            f"data: expected at least {least} tokens for one window, got {len(ids)}. Give more "
            "text, or lower --length"
        )
