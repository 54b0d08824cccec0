"""Rows that a geolip learns from: features of a host's texts, in memory or on disk.

texts = load_texts(["wiki.txt"])
windows = stored_features("cache", host, tokenizer, texts.paragraphs, key={...})
train, held_out = split_windows(windows, held_out=0.1, seed=0)
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ...models.geolip.features import FeatureWindow, extract_features
from .feature_files import MANIFEST_FILE, StoredFeatures, holds, store_features
from .splitting import drawn_apart

__all__ = [
    "StoredFeatures",
    "split_windows",
    "store_features",
    "stored_features",
    "weights_digest",
    "windows_of",
]


def stored_features(
    folder: Path,
    host: PreTrainedModel,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    key: Mapping[str, Any],
    layer: int = -1,
    max_length: int = 128,
    batch_size: int = 32,
    device: torch.device | str | None = None,
    progress: bool = False,
) -> StoredFeatures:
    """The features of `texts`, of `folder` if it has just these, or else extracted into it.

    An extraction that was stopped leaves nothing behind and starts anew.

    Args:
        folder: a folder for these features and nothing else.
        host, tokenizer, texts, layer, max_length, batch_size, device: of `extract_features`.
        key: what makes these features what they are, JSON-able: host, texts, layer.
        progress: show a bar where there is a terminal.

    Raises:
        ValueError: a folder that holds something else than features.
    """
    folder = Path(folder)
    wanted = {**key, "layer": layer, "max_length": max_length}
    if holds(folder, wanted):
        return StoredFeatures(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST_FILE).is_file():
        raise ValueError(
            f"{folder}: expected a folder of features or none, it holds other files. Choose "
            "another folder"
        )
    windows = extract_features(
        host,
        tokenizer,
        texts,
        layer=layer,
        max_length=max_length,
        batch_size=batch_size,
        device=device,
    )
    store_features(folder, _shown(windows, len(texts), progress), wanted)
    return StoredFeatures(folder)


def split_windows(
    windows: StoredFeatures | Sequence[FeatureWindow], held_out: float = 0.1, seed: int = 0
) -> tuple[Any, Any]:
    """Rows to learn from, and rows of other texts: a share of the texts, drawn by `seed`.

    Args:
        windows: as `extract_features` yields them, or stored.
        held_out: share of the texts, in (0, 1); 2 texts at least.
        seed: of the draw.

    Returns:
        Two lists of rows for GeolipCollator, or two StoredFeatures.

    Raises:
        ValueError: a share outside of (0, 1), or fewer than 3 texts.
    """
    if isinstance(windows, StoredFeatures):
        indices = windows.text_indices
    else:
        indices = [window.text_index for window in windows]
    texts = sorted(set(indices))
    away = drawn_apart(len(texts), held_out, seed, "texts")
    place = {texts[number]: rank for rank, number in enumerate(away)}
    train = [i for i, text in enumerate(indices) if text not in place]
    rest = [i for i, text in enumerate(indices) if text in place]
    # Neighbours may be about the same, and a verdict takes context from the next window.
    rest.sort(key=lambda i: place[indices[i]])
    if isinstance(windows, StoredFeatures):
        return windows.part(train), windows.part(rest)
    rows = [{"patches": window.features} for window in windows]
    return [rows[i] for i in train], [rows[i] for i in rest]


def windows_of(rows: Iterable[Mapping[str, Tensor]]) -> Iterator[FeatureWindow]:
    """Rows as windows, for `feature_statistics`."""
    for index, row in enumerate(rows):
        yield FeatureWindow(row["patches"], index)


def weights_digest(model: nn.Module) -> str:
    """Of every parameter and buffer by name, bit for bit: two hosts with equal digests are one."""
    found = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        found.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return found.hexdigest()[:16]


def _shown(windows: Iterable[FeatureWindow], texts: int, progress: bool) -> Iterator[FeatureWindow]:
    with tqdm(total=texts, desc="features", unit="text", disable=None if progress else True) as bar:
        for window in windows:
            bar.update(window.text_index + 1 - bar.n)
            yield window
