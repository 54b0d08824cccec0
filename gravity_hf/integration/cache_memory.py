"""What a cache takes, counted from the storages of everything that it holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor


def held_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storages behind tensors, each storage once and whole."""
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    return sum(storages.values())


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor of a layer's attributes, however deep in lists and dicts; of tensors that are
    made of others (quantised ones, say) those others."""
    if isinstance(value, Tensor):
        parts = getattr(value, "__tensor_flatten__", None)
        if parts is None:
            yield value
            return
        yield from tensors_in([getattr(value, name) for name in parts()[0]])
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from tensors_in(part)


def cache_bytes(cache: Any) -> int:
    """Bytes that any of transformers' caches takes."""
    return held_bytes(x for layer in cache.layers for x in tensors_in(vars(layer)))
