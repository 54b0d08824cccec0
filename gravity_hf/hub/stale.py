"""Files in a repository that a loader could pick up instead of, or on top of, what is pushed."""

from __future__ import annotations

import posixpath
from collections.abc import Collection, Iterable

from .checks import ADAPTER_CONFIG_FILE, CONFIG_FILE
from .contents import PICKLES

_WEIGHTS = (*PICKLES, ".safetensors", ".gguf", ".onnx", ".index.json")
# What Trainer leaves beside the weights; no loader of models reads it.
_NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt")
_FIGURES = "figures/"


def stale_files(there: Iterable[str], pushed: Collection[str]) -> tuple[str, ...]:
    """Of the paths in a repository, those that go in the commit that brings `pushed`.

    Weights at the top that the push does not replace (shards of an earlier save, pickles, files of
    other formats made from other weights), the config of the other kind of export, and figures of
    the model that was there before.
    """
    new = set(pushed)
    figures = any(path.startswith(_FIGURES) for path in new)
    return tuple(
        sorted(
            path
            for path in there
            if path not in new and (_misleads(path, new) or (figures and path.startswith(_FIGURES)))
        )
    )


def _misleads(path: str, new: Collection[str]) -> bool:
    if posixpath.dirname(path):
        # Loaders look at the top unless they are told a subfolder.
        return False
    if path == CONFIG_FILE:
        return ADAPTER_CONFIG_FILE in new
    if path == ADAPTER_CONFIG_FILE:
        return CONFIG_FILE in new
    return path.lower().endswith(_WEIGHTS) and path not in _NO_WEIGHTS
