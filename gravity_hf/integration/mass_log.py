"""Reads the masses that Gravity-2 keeps in a file of their own, `gravity_mass_log.pt`.

How that file is laid out inside is not published, so every layout with exactly one meaning is read
and everything else is refused: a guessed mass is another model.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

# A mass file of a thousand layers with a thousand heads holds 4 MB.
MAX_BYTES = 64 * 2**20
_SIZE_LIMIT = f"at most {MAX_BYTES >> 20} MiB of masses"

_ENCLOSING_KEYS = ("state_dict", "gravity_mass_log")
_WRAPPER_PREFIXES = ("module.", "_orig_mod.", "base_model.model.")
_PARAMETER_SUFFIXES = (".gravity_mass_log", ".gravity.mass_log")
_LAYER_INDEX = re.compile(r"(?:layers?[._])?([0-9]{1,6})")
_BLOCKED_NAME = re.compile(r"\bGLOBAL (\S+)")

_EXPECTED = (
    "one float tensor of masses per attention layer: a dict keyed by parameter name, module name "
    "or layer index, a list, or one stacked tensor [layers, heads]"
)
_NEXT_STEP = (
    "Check that the file belongs to this model; to rewrite it, save "
    "{'<attention module name>': mass_log} with torch.save or safetensors"
)


def read_mass_log(path: str | os.PathLike[str], layer_names: Sequence[str]) -> list[Tensor]:
    """The `mass_log` of every attention layer, before softplus.

    Args:
        path: a file written by `torch.save`, or one whose name ends in `.safetensors`. It is read
            without running any code that it may contain.
        layer_names: dotted names of the model's attention modules, in the order in which the model
            lists them. Layer indices in the file count in this order.

    Returns:
        One float32 CPU tensor `[masses]` per layer, in the order of `layer_names`; `masses` may
        differ between layers and is 1 where the file has one mass per layer: see
        `check_mass_counts`.

    Raises:
        ValueError: the file is missing, unreadable, contains code, or does not hold exactly one row
            of finite masses for every layer.
    """
    file = Path(path)
    if not layer_names:
        raise ValueError(
            f"{file}: expected the names of the model's attention modules, got none. Pass the "
            "names of the modules that the masses belong to"
        )
    contents = _unwrap(_load(file))
    if isinstance(contents, dict):
        rows = _rows_by_key(file, contents, layer_names)
    elif isinstance(contents, (list, tuple)):
        rows = _rows_in_order(file, contents, layer_names)
    elif isinstance(contents, Tensor):
        _require_plain(file, "the tensor", contents)
        if contents.dim() != 2:
            # [n] could be n layers with one mass or n heads that all layers share: no guessing.
            got = f"one tensor of shape {list(contents.shape)}"
            raise _refusal(file, "a stacked tensor to have the shape [layers, heads]", got)
        rows = _rows_in_order(file, contents, layer_names)
    else:
        raise _refusal(file, _EXPECTED, f"a {type(contents).__name__}")
    return [_checked_row(file, name, row) for name, row in zip(layer_names, rows, strict=True)]


def check_mass_counts(masses: Sequence[Tensor], counts: Sequence[tuple[int, int]]) -> str:
    """What one mass belongs to: `"query_head"`, `"kv_head"` or `"layer"`, the same in all layers.

    Args:
        masses: one tensor `[masses]` per attention layer, as `read_mass_log` returns them.
        counts: (query heads, key/value heads) of the same layers.

    Returns:
        The finest granularity that fits every layer, in the words of `GravityConfig.mass_per`.

    Raises:
        ValueError: none fits; the message names the first layer that rules out the last one.
    """
    if len(masses) != len(counts):
        raise ValueError(
            f"masses: expected one tensor for each of {len(counts)} attention layers, got "
            f"{len(masses)}. Read the file with the names of this model's attention modules"
        )
    possible = ["query_head", "kv_head", "layer"]
    for index, (mass, (query_heads, kv_heads)) in enumerate(zip(masses, counts, strict=True)):
        sizes = {"query_head": query_heads, "kv_head": kv_heads, "layer": 1}
        fitting = [name for name in possible if sizes[name] == mass.numel()]
        if not fitting:
            expected = " or ".join(f"{sizes[name]} (one per {name})" for name in possible)
            raise ValueError(
                f"masses of attention layer {index}: expected {expected}, as in the layers before, "
                f"got {mass.numel()}. The masses belong to a model with other head counts"
            )
        possible = fitting
    return possible[0]


def _load(file: Path) -> Any:
    """What the file holds, as tensors and plain containers; code in it is never run."""
    if not file.is_file():
        found = "a folder" if file.is_dir() else "no such file"
        raise _refusal(file, "a file of masses", found, "Check the path")
    size = file.stat().st_size
    if size == 0:
        raise _refusal(file, "a file of masses", "an empty file", "Download it again")
    if size > MAX_BYTES:
        raise _refusal(file, _SIZE_LIMIT, f"{size / 2**20:.0f} MiB")
    data = file.read_bytes()
    # A damaged or hostile file may raise anything from inside the readers, hence `Exception`.
    if file.suffix.lower() == ".safetensors":
        try:
            return safetensors.torch.load(data)
        except Exception as error:
            raise _refusal(file, "a safetensors file", f"unreadable bytes ({error})") from error
    try:
        unpacked = _unpacked_size(data)
        if unpacked <= MAX_BYTES:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:
        blocked = _blocked_code(error)
        if blocked is None:
            got = f"unreadable bytes ({type(error).__name__})"
            raise _refusal(file, "a file written by torch.save", got) from error
        # torch's own message recommends loading with the protection off; this one must not.
        raise ValueError(
            f"{file}: refused because it contains code, or objects that only code can rebuild; "
            f"nothing was executed. Expected {_EXPECTED}, got {blocked}. Do not open the file with "
            "other tools; ask its author for a safetensors file"
        ) from error
    raise _refusal(file, _SIZE_LIMIT, f"{unpacked / 2**20:.0f} MiB after unpacking")


def _blocked_code(error: Exception) -> str | None:
    """What torch's restricted reader refused to run, or None if the file is merely damaged."""
    if isinstance(error, pickle.UnpicklingError):
        name = _BLOCKED_NAME.search(str(error))
        return f"a call of {name[1]}" if name else "a pickle of objects other than tensors"
    return "a TorchScript archive" if "TorchScript" in str(error) else None


def _unpacked_size(data: bytes) -> int:
    """Bytes after unpacking. A zip can be small and unpack to any size; torch.save's are plain."""
    stream = io.BytesIO(data)
    if not zipfile.is_zipfile(stream):
        return len(data)
    with zipfile.ZipFile(stream) as archive:
        return sum(entry.file_size for entry in archive.infolist())


def _unwrap(contents: Any) -> Any:
    """What lies under enclosing keys such as `{"state_dict": ...}`."""
    # Bounded, because a pickled dict can contain itself.
    for _ in range(4):
        if not isinstance(contents, dict) or len(contents) != 1:
            break
        (key,) = contents
        if not isinstance(key, str) or key not in _ENCLOSING_KEYS:
            break
        contents = contents[key]
    return contents


def _rows_by_key(file: Path, contents: dict[Any, Any], layer_names: Sequence[str]) -> list[Any]:
    positions = {_strip_wrappers(name): index for index, name in enumerate(layer_names)}
    found: dict[int, tuple[Any, Any]] = {}
    unknown = []
    for key, value in contents.items():
        index = _layer_index(key, positions)
        if index is None:
            unknown.append(key)
        elif index >= len(layer_names):
            got = f"a mass for layer {index} (key {key!r})"
            raise _refusal(file, f"masses for {len(layer_names)} attention layers", got)
        elif index in found:
            got = f"two for {layer_names[index]}: keys {found[index][0]!r} and {key!r}"
            raise _refusal(file, "one entry per attention layer", got)
        else:
            found[index] = key, value
    if unknown:
        expected = f"only keys that name an attention layer, such as {layer_names[0]!r} or 0"
        raise _refusal(file, expected, f"{len(unknown)} other keys: {_few(unknown)}")
    missing = [name for index, name in enumerate(layer_names) if index not in found]
    if missing:
        expected = f"masses for {len(layer_names)} attention layers"
        raise _refusal(file, expected, f"none for {len(missing)} of them: {_few(missing)}")
    return [found[index][1] for index in range(len(layer_names))]


def _rows_in_order(
    file: Path, rows: Sequence[Any] | Tensor, layer_names: Sequence[str]
) -> list[Any]:
    if len(rows) != len(layer_names):
        missing = layer_names[len(rows) :]
        got = f"{len(rows)} rows" + (f", none for {_few(missing)}" if missing else "")
        raise _refusal(file, f"masses for {len(layer_names)} attention layers", got)
    return list(rows)


def _layer_index(key: Any, positions: dict[str, int]) -> int | None:
    """The layer that a key means, or None. Names come first: a module may be called "0"."""
    if isinstance(key, int) and not isinstance(key, bool) and key >= 0:
        return key
    if not isinstance(key, str):
        return None
    name = _strip_wrappers(key)
    for suffix in _PARAMETER_SUFFIXES:
        name = name.removesuffix(suffix)
    if name in positions:
        return positions[name]
    index = _LAYER_INDEX.fullmatch(name)
    return int(index[1]) if index else None


def _strip_wrappers(name: str) -> str:
    """A name without what DataParallel, torch.compile and peft put in front of it."""
    stripped = True
    while stripped:
        stripped = False
        for prefix in _WRAPPER_PREFIXES:
            if name.startswith(prefix):
                name, stripped = name.removeprefix(prefix), True
    return name


def _require_plain(file: Path, what: str, value: Any) -> None:
    """Refuses all but dense float tensors of a size that masses can have."""
    if not isinstance(value, Tensor):
        raise _refusal(file, f"{what} to be a float tensor", f"a {type(value).__name__}")
    if not value.is_floating_point():
        raise _refusal(file, f"{what} to have a float dtype", str(value.dtype))
    if value.layout != torch.strided or value.is_meta or value.is_nested:
        got = f"{value.layout} on {value.device}"
        raise _refusal(file, f"{what} to be a dense tensor with values", got)
    # A stride of 0 lets a file of a kilobyte describe any number of values.
    if value.numel() * 4 > MAX_BYTES:
        raise _refusal(file, f"{what} to hold masses of one model", f"{value.numel()} values")


def _checked_row(file: Path, name: str, value: Any) -> Tensor:
    """One layer's masses as float32 `[masses]`, in memory of their own."""
    what = f"the entry of {name}"
    _require_plain(file, what, value)
    if value.dim() > 1 or value.numel() == 0:
        expected = f"{what} to have the shape [heads], [1] or []"
        raise _refusal(file, expected, f"shape {list(value.shape)}")
    row = value.detach().reshape(-1).to(torch.float32, copy=True)
    if not row.isfinite().all():
        bad = int((~row.isfinite()).sum())
        got = f"{bad} of {row.numel()} NaN or infinite"
        raise _refusal(file, f"{what} to hold finite values", got)
    return row


def _refusal(file: Path, expected: str, got: str, next_step: str = _NEXT_STEP) -> ValueError:
    return ValueError(f"{file}: expected {expected}, got {got}. {next_step}")


def _few(values: Iterable[Any], count: int = 4) -> str:
    """The first few values, for an error message."""
    listed = list(values)
    more = f" and {len(listed) - count} more" if len(listed) > count else ""
    return ", ".join(repr(value)[:80] for value in listed[:count]) + more
