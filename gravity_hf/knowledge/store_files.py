"""Files of a store: written whole or not at all, read only after they were checked."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load, save

from ..runtime.encoding import json_value, parsed_json, strict_json
from .delta import LowRankDelta
from .errors import UnsafeFileError, ValidationError
from .residual_delta import ResidualDelta

if TYPE_CHECKING:
    from .quantizing import Quantized

LARGEST_DELTA = 2**30
LARGEST_JSON = 2**28
_FORMAT = "gravity-delta/1"
_KINDS = {kind.kind: kind for kind in (LowRankDelta, ResidualDelta)}
_CONTENT = ("fact", "metadata", "report")


def sha256(data: bytes) -> str:
    """Hex."""
    return hashlib.sha256(data).hexdigest()


def confined(root: Path, name: str) -> Path:
    """The file `name` of the folder `root`.

    Raises:
        UnsafeFileError: it lies elsewhere, also by way of a link.
    """
    root = root.resolve()
    path = root / name
    parts = Path(name).parts
    if not parts or ".." in parts or Path(name).is_absolute() or path.resolve() != path:
        raise UnsafeFileError(
            f"{name!r}: expected a file inside {str(root)!r} and no link, got one that leads "
            "elsewhere. Nothing is read or written there"
        )
    return path


def read_bytes(path: Path, limit: int) -> bytes:
    """All of a regular file.

    Raises:
        UnsafeFileError: it is none, or larger than `limit` bytes.
        FileNotFoundError: there is none.
    """
    # O_NONBLOCK: opening a pipe would wait for whoever writes into it.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnsafeFileError(f"{path}: expected a regular file, got {error.strerror}") from error
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise UnsafeFileError(f"{path}: expected a regular file, got another kind")
    with open(descriptor, "rb") as file:
        # It may grow while it is read.
        data = file.read(limit + 1)
    if len(data) > limit:
        raise UnsafeFileError(
            f"{path}: expected at most {limit} bytes, got {max(status.st_size, len(data))}. "
            "It is not read"
        )
    return data


def write_bytes(path: Path, data: bytes, settle: bool = True) -> None:
    """Write under another name, wait for the disk, rename: `path` is whole or as it was.

    Args:
        settle: wait for the folder, too; without it, call `settle_folder` after the last file.
    """
    unfinished = path.with_name(f".{path.name}.tmp")
    # Made anew, never opened: it could be somebody's link to another file.
    unfinished.unlink(missing_ok=True)
    try:
        with unfinished.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    if settle:
        settle_folder(path.parent)


def settle_folder(path: Path) -> None:
    """Without it a loss of power may bring back the older file."""
    if os.name == "posix":
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)


def delta_bytes(
    delta: LowRankDelta, content: Mapping[str, Any], quantized: Quantized | None = None
) -> bytes:
    """A safetensors file: the factors, and `content` (`fact`, `metadata`, `report`) as JSON.

    Args:
        quantized: `delta` is what its codes stand for, and the file gets the codes.

    Raises:
        ValidationError: a kind of delta that has no file, or content that has no JSON form.
        UnsafeFileError: NaN or an infinity, or more than a file may hold.
    """
    if delta.kind not in _KINDS:
        raise ValidationError(
            f"store: expected a delta of kind {' or '.join(_KINDS)}, got {delta.kind!r}"
        )
    delta.check_finite()
    if delta.nbytes() > LARGEST_DELTA // 2:
        raise UnsafeFileError(
            f"store: expected a delta of at most {LARGEST_DELTA // 2} bytes, got "
            f"{delta.nbytes()}. Lower its rank, or store it as several"
        )
    try:
        texts = {name: strict_json(json_value(content.get(name), name)) for name in _CONTENT}
    except (TypeError, ValueError) as error:
        raise ValidationError(f"store: {error}") from error
    header = {"format": _FORMAT, "kind": delta.kind, **texts}
    if quantized is not None:
        # Imported here: it reads and writes by this module.
        from .quantized_files import serialized

        return serialized(quantized.delta, quantized.report, header)
    tensors = {name: tensor.cpu() for name, tensor in delta.to_tensors().items()}
    return save(tensors, header)


def parse_delta(data: bytes, where: str) -> tuple[LowRankDelta, dict[str, Any]]:
    """The delta and the content of `delta_bytes`; tensors on the CPU.

    Raises:
        UnsafeFileError: not such a file, or numbers that are not finite.
        QuantizationError, IntegrityError: codes that do not keep what they promise.
    """
    header = header_metadata(data, where)
    if header.get("format") != _FORMAT or header.get("kind") not in _KINDS:
        raise UnsafeFileError(
            f"{where}: expected a delta of format {_FORMAT}, got format {header.get('format')!r} "
            f"and kind {header.get('kind')!r}. Import other adapters with import_peft"
        )
    try:
        content = {name: parsed_json(header[name]) for name in _CONTENT}
        delta = _coded(data, where) or _KINDS[header["kind"]].from_tensors(load(data))
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UnsafeFileError(f"{where}: expected a safetensors file, {error}") from error
    delta.check_finite()
    return delta, content


def _coded(data: bytes, where: str) -> LowRankDelta | None:
    """What the codes in a file stand for; None of a file of factors."""
    from .quantized_files import METADATA, parsed

    if METADATA not in header_metadata(data, where):
        return None
    return parsed(data, where).delta.dequantize()


def header_metadata(data: bytes, where: str) -> dict[str, Any]:
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise UnsafeFileError(f"{where}: expected a safetensors file, got something else")
    try:
        header = parsed_json(data[8 : 8 + size])
    except ValueError as error:
        raise UnsafeFileError(f"{where}: expected a safetensors file, {error}") from error
    metadata = header.get("__metadata__") if isinstance(header, dict) else None
    return metadata if isinstance(metadata, dict) else {}
