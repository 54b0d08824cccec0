"""A digest of a base model by which any change of it is seen and named.

A leaf is the SHA-256 of one tensor with its name, dtype and shape; the root is the SHA-256 over all
leaves. The configuration and the tokenizer have a leaf each.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..runtime.encoding import json_value, parsed_json, strict_json
from .errors import IncompatibleBaseError
from .settled_base import settle
from .targets import base_model
from .tokenizer_digest import tokenizer_digest

CONFIG_LEAF, TOKENIZER_LEAF = "(config)", "(tokenizer)"
# What saving, loading or generating sets, and what leaves outputs as they are.
_OF_NO_CONSEQUENCE = frozenset(
    (
        *("_name_or_path", "transformers_version", "architectures", "auto_map", "_commit_hash"),
        *("dtype", "torch_dtype", "use_cache", "output_attentions", "output_hidden_states"),
        *("return_dict", "attn_implementation", "_attn_implementation", "id2label", "label2id"),
    )
)
# Bytes hashed at once: of a tensor on a GPU no more than this is copied at a time.
_PIECE = 64 * 2**20
# More than this many bytes take long enough for a bar.
_LONG = 2**31


class Changes(NamedTuple):
    """Names of the leaves by which two digests differ, each sorted."""

    changed: list[str]
    missing: list[str]
    added: list[str]

    def __bool__(self) -> bool:
        return any(self)

    def names(self) -> list[str]:
        """All of them."""
        return sorted({*self.changed, *self.missing, *self.added})

    def __str__(self) -> str:
        words = zip(self._fields, self, strict=True)
        return "; ".join(f"{word}: {_shown(names)}" for word, names in words if names) or "none"


@dataclass(frozen=True)
class BaseDigest:
    """Of one base.

    Attributes:
        leaves: tensor's name (or `"(config)"`, `"(tokenizer)"`) -> SHA-256, hex.
    """

    leaves: Mapping[str, str]

    @property
    def root(self) -> str:
        """SHA-256 over `name:leaf` lines, sorted by name; hex."""
        lines = [f"{name}:{self.leaves[name]}\n" for name in sorted(self.leaves)]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def compare(self, other: BaseDigest) -> Changes:
        """What `other` has changed, lacks and has besides, against this one."""
        ours, theirs = self.leaves, other.leaves
        return Changes(
            sorted(n for n in ours if n in theirs and ours[n] != theirs[n]),
            sorted(n for n in ours if n not in theirs),
            sorted(n for n in theirs if n not in ours),
        )


def compute_digest(
    model: nn.Module, tokenizer: Any = None, progress: bool | None = None
) -> BaseDigest:
    """The digest of a model as it is in memory.

    Covers every parameter and persistent buffer, and what quantised layers keep beside them; tied
    tensors once, under their first name. What peft put around or beside the base is left out. A
    chat template is no part of the tokenizer here: facts are learned as plain text. Of four-bit
    weights of bitsandbytes on a CPU, in evaluation, it is that of the form they are used in.

    Args:
        tokenizer: adds a leaf for it.
        progress: a bar; None shows one where it takes long.

    Raises:
        IncompatibleBaseError: a tensor that has no bytes here, as offloaded ones.
    """
    model = base_model(model)
    settle(model)
    leaves = _leaves(_named_state(model), progress)
    if hasattr(model, "config"):
        leaves[CONFIG_LEAF] = config_digest(model.config)
    if tokenizer is not None:
        leaves[TOKENIZER_LEAF] = tokenizer_digest(tokenizer)
    return BaseDigest(leaves)


def digest_of_folder(folder: str | os.PathLike[str], progress: bool = False) -> BaseDigest:
    """Leaves of the tensors in a folder's safetensors files, one at a time: no model is built.

    They equal those of the loaded model where files and model have the same names and dtypes, as
    after `save_pretrained`; without leaves for configuration and tokenizer.

    Raises:
        IncompatibleBaseError: no such file, or one name in two files.
    """
    files = sorted(Path(folder).glob("*.safetensors"))
    if not files:
        raise IncompatibleBaseError(
            f"digest_of_folder: expected *.safetensors in {os.fspath(folder)!r}, got none. Save "
            "the model with save_pretrained"
        )
    leaves: dict[str, str] = {}
    for file in files:
        with safe_open(file, framework="pt") as shard:
            names = tqdm(shard.keys(), desc=file.name, unit=" tensors", disable=not progress)
            found = {name: leaf_digest(name, shard.get_tensor(name)) for name in names}
        twice = sorted(set(found).intersection(leaves))
        if twice:
            raise IncompatibleBaseError(
                f"digest_of_folder: expected each tensor in one file, got {twice[0]} again in "
                f"{file.name}. Remove what is left of another model"
            )
        leaves.update(found)
    return BaseDigest(leaves)


def passing_leaves(model: nn.Module) -> dict[str, str]:
    """Leaves of the buffers that are not saved (frequencies of positions, ...): the same for as
    long as a model is in memory. Not of positions that follow the length of the text."""
    model = base_model(model)
    saved = set(model.state_dict(keep_vars=True))
    inside = _wrapped(model)
    steady = {
        _base_name(name, inside): buffer
        for name, buffer in model.named_buffers()
        if name not in saved and not _follows_length(model.get_submodule(name.rpartition(".")[0]))
    }
    return _leaves([(name, buffer) for name, buffer in steady.items() if name], False)


def _follows_length(module: nn.Module) -> bool:
    kinds = getattr(module, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, Mapping) else [kinds]
    return any(kind in ("dynamic", "longrope") for kind in kinds)


def config_digest(config: Any) -> str:
    """SHA-256 of what differs from the defaults, without what changes no output; hex."""
    values = parsed_json(config.to_json_string(use_diff=True))
    return hashlib.sha256(_canonical(_of_consequence(values)).encode()).hexdigest()


def _of_consequence(values: Any) -> Any:
    if isinstance(values, Mapping):
        kept = {k: v for k, v in values.items() if k not in _OF_NO_CONSEQUENCE}
        return {k: _of_consequence(kept[k]) for k in sorted(kept)}
    return [_of_consequence(v) for v in values] if isinstance(values, list) else values


def _canonical(value: Any) -> str:
    return strict_json(json_value(value, "digest"))


def _named_state(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """What `state_dict` has, under the base's names, tied tensors once."""
    inside = _wrapped(model)
    seen: set[int] = set()
    for name, value in model.state_dict(keep_vars=True).items():
        own = _base_name(name, inside)
        if own is None or id(value) in seen:
            continue
        seen.add(id(value))
        yield own, value


def _wrapped(model: nn.Module) -> dict[str, str]:
    """Names of peft's modules, each with the attribute that holds what it wraps."""
    parts = {name: _part_of_base(module) for name, module in model.named_modules()}
    return {name: part for name, part in parts.items() if part is not None}


def _part_of_base(module: nn.Module) -> str | None:
    """Of a module of peft the attribute that is the base's; None for a module of the base."""
    if not type(module).__module__.startswith("peft."):
        return None
    return next((a for a in ("base_layer", "original_module") if hasattr(module, a)), None)


def _base_name(name: str, inside: Mapping[str, str]) -> str | None:
    """`name` without peft's wrappers; None where it is peft's own."""
    path, kept = "", []
    parts = iter(name.split("."))
    for part in parts:
        while path in inside:
            if part != inside[path]:
                return None
            path = f"{path}.{part}"
            part = next(parts)
        kept.append(part)
        path = f"{path}.{part}" if path else part
    return ".".join(kept)


def _leaves(state: Iterable[tuple[str, Any]], progress: bool | None) -> dict[str, str]:
    items = list(state)
    size = sum(getattr(value, "nbytes", 0) for _, value in items)
    disable = size < _LONG if progress is None else not progress
    # hashlib lets other threads run while it works on large buffers.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = pool.map(lambda item: leaf_digest(*item), items)
        named = zip(items, found, strict=True)
        bar = tqdm(named, desc="digest", unit=" tensors", total=len(items), disable=disable)
        return {name: leaf for (name, _), leaf in bar}


def leaf_digest(name: str, value: Any) -> str:
    """SHA-256 over the name, dtype, shape and little-endian bytes of a tensor; hex.

    Tensors made of several (quantised ones) are hashed part by part; what is no tensor, as JSON.
    """
    digest = hashlib.sha256()
    encoded = name.encode()
    digest.update(len(encoded).to_bytes(8, "little") + encoded)
    _add(digest, name, value)
    return digest.hexdigest()


def _add(digest: Any, name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        digest.update(b"|json|" + _canonical(value).encode())
    elif hasattr(value, "__tensor_flatten__"):
        parts, _ = value.__tensor_flatten__()
        digest.update(f"|{type(value).__name__}|{len(parts)}|".encode())
        for part in parts:
            digest.update(f"{part}:".encode())
            _add(digest, name, getattr(value, part))
    else:
        shape = ",".join(map(str, value.shape))
        digest.update(f"|{str(value.dtype).removeprefix('torch.')}|{shape}|".encode())
        _add_bytes(digest, name, value.detach())


def _add_bytes(digest: Any, name: str, tensor: Tensor) -> None:
    if tensor.is_meta:
        raise IncompatibleBaseError(
            f"digest: expected {name} in memory, got it on the meta device: offloaded or not "
            "loaded. Load the model without offloading, or digest its files (digest_of_folder)"
        )
    # Also bfloat16 and eight-bit floats, which NumPy lacks, are bytes.
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    for start in range(0, flat.numel(), _PIECE):
        digest.update(flat[start : start + _PIECE].cpu().numpy().data)


def _shown(names: list[str], most: int = 5) -> str:
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
