"""Hidden states of a host as windows of features, one text at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer, PreTrainedModel

from ...layers.modes import in_evaluation
from .companion_hosts import (
    encoder_of,
    has_head,
    layer_index,
    layers_of,
    positions_of,
    prefix_tokens_of,
    reads_images,
    special_ids_of,
)
from .feature_statistics import FeatureStatistics, feature_statistics

# How many batches are sorted by length together, so that like lengths share one.
_BATCHES_AHEAD = 8


@dataclass(frozen=True)
class FeatureWindow:
    """Features of one text.

    Attributes:
        features: float32 `[n, C]`, on the CPU: tokens in their order, special ones left out.
        text_index: place of the text, from 0, among those given.
    """

    features: Tensor
    text_index: int


def extract_features(
    model: str | PreTrainedModel,
    tokenizer: Any = None,
    texts: Iterable[Any] | None = None,
    *,
    layer: int = -1,
    max_length: int = 128,
    batch_size: int = 32,
    device: str | torch.device | None = None,
    deduplicate: bool = True,
) -> Iterator[FeatureWindow]:
    """What a host makes of texts, as windows in the order of the texts, computed as they are read.

    The host is in evaluation, without gradients, while a batch runs, and as it was in between. A
    text is one window: what is longer than `max_length` is cut. Special tokens and padding are left
    out; a text without others gives no window.

    Args:
        model: a name or folder for `AutoModel`, or a model: an encoder, a decoder, an
            encoder-decoder, of which the encoder is taken, or one that reads images, whose windows
            are then patches.
        tokenizer: of the host, or its image processor; None: of the same name.
        texts: strings, read `8 batch_size` at a time; of a host that reads images, images.
        layer: index of the hidden states: 0 is what the first block reads, -1 is
            `last_hidden_state`.
        max_length: in tokens, special ones included.
        batch_size: texts that run together.
        device: where the host is moved to, and stays. None: where it is; a host given by its name
            goes to a GPU where there is one.
        deduplicate: a text with the tokens of an earlier one (an image with its pixels) is left
            out.

    Raises:
        TypeError: no transformers model, or texts that are one string.
        ValueError: a layer that is not there, no tokenizer, no texts, more tokens than the host has
            positions.
    """
    if texts is None or isinstance(texts, (str, bytes)):
        got = "none" if texts is None else f"one {type(texts).__name__}"
        raise TypeError(f"extract_features: expected texts, an iterable of strings, got {got}")
    for name, number in (("max_length", max_length), ("batch_size", batch_size)):
        if number < 1:
            raise ValueError(f"extract_features: expected {name} >= 1, got {number}")
    name = model if isinstance(model, str) else None
    if name is not None:
        model = AutoModel.from_pretrained(name)
        device = device or ("cuda" if torch.cuda.is_available() else None)
    host = encoder_of(model)
    index = layer_index(host.config, layer)
    tokenizer = tokenizer or _reader_of(host, name)
    if device is not None:
        host.to(device)
    read = _images if reads_images(host) else _texts
    items = read(tokenizer, iter(texts), max_length, batch_size * _BATCHES_AHEAD)
    seen: set[bytes] | None = set() if deduplicate else None
    return _windows(host, index, items, batch_size, seen)


class _Item(NamedTuple):
    """An input that has been read: what the host takes, without a batch; what it is known by; and
    which of its tokens are content, None where only the host's first ones are none."""

    index: int
    inputs: Tensor
    key: bytes
    content: Tensor | None


def _windows(
    host: PreTrainedModel,
    layer: int,
    chunks: Iterator[list[_Item]],
    batch_size: int,
    seen: set[bytes] | None,
) -> Iterator[FeatureWindow]:
    for chunk in chunks:
        fresh = chunk if seen is None else [item for item in chunk if _is_new(item.key, seen)]
        by_length = sorted(fresh, key=lambda item: len(item.inputs))
        found: dict[int, Tensor] = {}
        for start in range(0, len(by_length), batch_size):
            batch = by_length[start : start + batch_size]
            features = _run(host, layer, batch)
            found.update(zip((item.index for item in batch), features, strict=True))
        for item in fresh:
            features = found.pop(item.index)
            if len(features):
                yield FeatureWindow(features, item.index)


def _run(host: PreTrainedModel, layer: int, batch: list[_Item]) -> list[Tensor]:
    """Features of each input of a batch."""
    with torch.no_grad(), in_evaluation(host):
        if reads_images(host):
            pixels = torch.stack([item.inputs for item in batch])
            hidden = hidden_states(host, layer, {"pixel_values": pixels.to(host.device)})
            hidden = hidden[:, prefix_tokens_of(host) :].float().cpu()
            # A copy, because a window is kept for longer than its batch.
            return [features.clone() for features in hidden]
        ids, mask = _padded(host, [item.inputs for item in batch])
        hidden = hidden_states(host, layer, {"input_ids": ids, "attention_mask": mask})
        hidden = hidden.float().cpu()
    rows = zip(hidden, batch, strict=True)
    return [features[: len(item.inputs)][item.content] for features, item in rows]


def hidden_states(host: PreTrainedModel, layer: int, inputs: dict[str, Any]) -> Tensor:
    """`[B, T, C]` of the layer with this index, see `layer_index`."""
    is_last = layer == layers_of(host.config)
    if is_last and not has_head(host):
        return host(**inputs).last_hidden_state
    return host(**inputs, output_hidden_states=True).hidden_states[layer]


def _padded(host: PreTrainedModel, rows: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Token ids and mask `[B, T]`; padding is on the right, where it moves no position."""
    longest = max(len(row) for row in rows)
    positions = positions_of(host)
    if positions is not None and longest > positions:
        raise ValueError(
            f"extract_features: expected at most {positions} tokens, the positions of "
            f"{host.config.model_type}, got a text of {longest}. Give max_length={positions}"
        )
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = row, 1
    return ids.to(host.device), mask.to(host.device)


def _texts(
    tokenizer: Any, texts: Iterator[str], max_length: int, ahead: int
) -> Iterator[list[_Item]]:
    special = torch.tensor(special_ids_of(tokenizer), dtype=torch.long)
    start = 0
    while chunk := list(islice(texts, ahead)):
        read = tokenizer(chunk, truncation=True, max_length=max_length)["input_ids"]
        rows = [torch.tensor(ids, dtype=torch.long) for ids in read]
        # A host cannot run on nothing.
        yield [
            _Item(start + i, ids, _digest(ids), ~torch.isin(ids, special))
            for i, ids in enumerate(rows)
            if len(ids)
        ]
        start += len(chunk)


def _images(
    processor: Any, images: Iterator[Any], max_length: int, ahead: int
) -> Iterator[list[_Item]]:
    start = 0
    while chunk := list(islice(images, ahead)):
        pixels = processor(chunk, return_tensors="pt")["pixel_values"]
        yield [_Item(start + i, image, _digest(image), None) for i, image in enumerate(pixels)]
        start += len(chunk)


def _reader_of(host: PreTrainedModel, name: str | None) -> Any:
    """The tokenizer or image processor that lies beside a host."""
    where = name or host.name_or_path
    what = AutoImageProcessor if reads_images(host) else AutoTokenizer
    if not where:
        raise ValueError(
            f"extract_features: expected a tokenizer beside a {type(host).__name__} that was not "
            f"loaded from anywhere, got none. Give {what.__name__}.from_pretrained(...)"
        )
    return what.from_pretrained(where)


def _digest(values: Tensor) -> bytes:
    return hashlib.blake2b(values.contiguous().numpy().tobytes(), digest_size=16).digest()


def _is_new(key: bytes, seen: set[bytes]) -> bool:
    is_new = key not in seen
    seen.add(key)
    return is_new


__all__ = ["FeatureStatistics", "FeatureWindow", "extract_features", "feature_statistics"]
