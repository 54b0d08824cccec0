"""What exports are measured on: text that the model's tokenizer reads, else random inputs."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ...training.text import prose_paragraphs, read_texts
from .source import Source, forward_arguments

NEW_TOKENS = 16
_ROWS_AT_ONCE = 4


@dataclass(frozen=True)
class Samples:
    """Batches of model inputs, and in words what they are."""

    batches: list[dict[str, Tensor]]
    description: str


def make_samples(
    source: Source, files: Sequence[Path] | None, count: int, length: int, seed: int
) -> Samples:
    """`count` rows of at most `length` tokens, or images; some rows of text are padded.

    Decoders are padded on the left, as for generating; all others on the right.

    Raises:
        ValueError: text for a model without a tokenizer or for images, or too little of it.
    """
    tokenizer = _tokenizer(source)
    if files and tokenizer is None:
        raise ValueError(
            f"--text: expected a text model with its tokenizer in the folder, "
            f"{str(source.folder)!r} has none. Leave --text out to measure on random inputs"
        )
    if source.kind == "vision":
        return Samples(_images(source, count, seed), f"{count} random images, seed {seed}")
    length = _fitting_length(source, length)
    if tokenizer is None:
        rows = _random_rows(source, count, length, seed)
        what = "random tokens"
    elif source.kind == "decoder":
        rows = _windows(tokenizer, read_texts(_list(files)), count, length, seed)
        what = _origin(files)
    else:
        paragraphs = prose_paragraphs(read_texts(_list(files)))
        batches = _tokenized(source, tokenizer, paragraphs, count, length, seed)
        return Samples(
            [completed(source, batch) for batch in batches],
            f"{count} paragraphs of at most {length} tokens of {_origin(files)}, seed {seed}",
        )
    batches = [completed(source, batch) for batch in _padded(source, rows)]
    return Samples(batches, f"{count} windows of at most {length} tokens of {what}, seed {seed}")


def _list(files: Sequence[Path] | None) -> list[Path] | None:
    return list(files) if files else None


def _origin(files: Sequence[Path] | None) -> str:
    return ", ".join(file.name for file in files) if files else "Python's help text"


def _tokenizer(source: Source) -> PreTrainedTokenizerBase | None:
    if not any(source.folder.glob("tokenizer*")):
        return None
    return AutoTokenizer.from_pretrained(source.folder)


def _fitting_length(source: Source, length: int) -> int:
    limit = getattr(source.model.config, "max_position_embeddings", None) or length + NEW_TOKENS
    return max(4, min(length, limit - NEW_TOKENS))


def _random_rows(source: Source, count: int, length: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    vocabulary = source.model.config.get_text_config().vocab_size
    return [[draw.randrange(vocabulary) for _ in range(length)] for _ in range(count)]


def _windows(
    tokenizer: PreTrainedTokenizerBase, text: str, count: int, length: int, seed: int
) -> list[list[int]]:
    # Enough for that many windows in any language, and not the whole of a large file.
    start = random.Random(seed).randrange(max(1, len(text) - 64 * count * length))
    ids = tokenizer(text[start : start + 64 * count * length], verbose=False)["input_ids"]
    if len(ids) < count * length:
        raise ValueError(
            f"--text: expected at least {count * length} tokens ({count} windows of {length}), got "
            f"{len(ids)}. Give more text, or a smaller --samples or --length"
        )
    return [ids[i * length : (i + 1) * length] for i in range(count)]


def _padded(source: Source, rows: list[list[int]]) -> list[dict[str, Tensor]]:
    """Batches in which every second row loses a part of its tokens to padding."""
    batches = []
    for start in range(0, len(rows), _ROWS_AT_ONCE):
        ids = torch.tensor(rows[start : start + _ROWS_AT_ONCE])
        mask = torch.ones_like(ids)
        for row in range(1, len(ids), 2):
            hidden = ids.shape[1] * (row + 1) // 8
            mask[row, :hidden] = 0
        if source.kind != "decoder":
            mask = mask.flip(1)
        batches.append({"input_ids": ids * mask, "attention_mask": mask})
    return batches


def _tokenized(
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    paragraphs: list[str],
    count: int,
    length: int,
    seed: int,
) -> list[dict[str, Tensor]]:
    if len(paragraphs) < count:
        raise ValueError(
            f"--text: expected at least {count} paragraphs of prose, got {len(paragraphs)}. Give "
            "more text, or a smaller --samples"
        )
    chosen = random.Random(seed).sample(paragraphs, count)
    accepted = forward_arguments(source.model)
    options: dict[str, Any] = {"padding": True, "truncation": True, "max_length": length}
    batches = []
    for start in range(0, count, _ROWS_AT_ONCE):
        texts = chosen[start : start + _ROWS_AT_ONCE]
        found = tokenizer(texts, return_tensors="pt", padding_side="right", **options)
        batches.append({name: x for name, x in found.items() if name in accepted})
    return batches


def completed(source: Source, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """A batch of text with the inputs that the model's software usually gives: the second text of
    an encoder-decoder, and the segments of a model that tells them apart."""
    if source.kind == "encoder-decoder":
        return {**batch, "decoder_input_ids": batch["input_ids"]}
    segments = getattr(source.model.config, "type_vocab_size", 0) or 0
    if source.kind == "encoder" and segments > 1 and "token_type_ids" not in batch:
        return {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])}
    return batch


def _images(source: Source, count: int, seed: int) -> list[dict[str, Tensor]]:
    config = source.model.config
    size = config.image_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels = getattr(config, "num_channels", 3)
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, channels, height, width, generator=generator)
    return [{"pixel_values": batch} for batch in images.split(_ROWS_AT_ONCE)]
