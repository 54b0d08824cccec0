"""Tensors that a checkpoint holds beside what its model's class reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from safetensors import safe_open
from torch import Tensor
from transformers.utils.hub import cached_file, get_checkpoint_shard_files

_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"


def read_extras(where: str, names: Iterable[str]) -> dict[str, Tensor]:
    """Those of `names` that the safetensors of a checkpoint hold, on the CPU.

    A plain load leaves them out: modules that this library adds to a host are saved among its
    weights, and read again from here.

    Args:
        where: folder or Hub repository, as `model.name_or_path` says; one without weights, or an
            empty name, holds nothing. Of a repository its main revision is read: a model does not
            know of which one it is. Another one has to be loaded from a folder.
    """
    wanted = set(names)
    found: dict[str, Tensor] = {}
    for file in _weight_files(where):
        with safe_open(file, "pt") as tensors:
            found |= {key: tensors.get_tensor(key) for key in wanted & set(tensors.keys())}
    return found


def _weight_files(where: str) -> list[str]:
    quietly: dict[str, Any] = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_gated_repo": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    if not where:
        return []
    index = cached_file(where, _INDEX, **quietly)
    if index is not None:
        return list(get_checkpoint_shard_files(where, index)[0])
    single = cached_file(where, _WEIGHTS, **quietly)
    return [] if single is None else [single]
