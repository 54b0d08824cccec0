"""Published knowledge deltas: `.delta` archives (format 2.0) and `.pt` files with factors.

Their tensors are pickles of torch, read with `weights_only`, which runs no code, and only after the
sizes of everything in the archive were checked. They are never written here.
"""

from __future__ import annotations

import io
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..runtime.encoding import parsed_json
from .delta import LowRankDelta
from .errors import IncompatibleBaseError, UnsafeFileError, ValidationError
from .residual_delta import ResidualDelta, hidden_size
from .store_files import read_bytes
from .targets import base_model, decoder_layers, is_linear

LARGEST_FILE = 2**28
LARGEST_UNPACKED = 2**29
_LARGEST_MANIFEST = 2**22
_MOST_FILES = 4096
_FACTOR = re.compile(r"factors/(?P<layer>0|[1-9]\d{0,4})_(?P<letter>[AB])\.pt")
_VECTORS = ("embedding.pt", "subspace_basis.pt")
_LAYER_KEY = re.compile(r"layer_(?P<layer>0|[1-9]\d{0,4})_(?P<target>[a-z_]+)")
# Their names for a map -> those that models on the Hub use.
_OTHER_NAMES = {"out_proj": ("out_proj", "o_proj", "dense"), "up_proj": ("up_proj", "fc1")}


def read_published(
    file: str | os.PathLike[str], model: nn.Module
) -> tuple[LowRankDelta, dict[str, Any]]:
    """The delta for `model`, and the file's own words about it.

    A `.delta` archive, or a `.pt` file with `factors` (`{layer: (A [d, r], B [r, d])}`), becomes a
    `ResidualDelta`: after block i, `h + h A_i B_i`. A `.pt` file with `layer_deltas`
    (`{"layer_3_down_proj": (A [in, r], B [r, out])}`) becomes a `LowRankDelta`. Which base it was
    made for cannot be checked against its `base_model_hash`, which is of another kind; shapes are.

    Raises:
        UnsafeFileError: another format, something besides tensors and plain values, more than
            512 MiB unpacked, or numbers that are not finite.
        IncompatibleBaseError: other layers or sizes than `model` has.
    """
    path = Path(file)
    try:
        data = read_bytes(path, LARGEST_FILE)
    except FileNotFoundError as error:
        raise UnsafeFileError(f"{path}: expected a published delta, got no file") from error
    sizes = _checked_sizes(data, str(path))
    if "manifest.json" in sizes:
        factors, metadata = _read_archive(data, sizes, str(path))
        delta: LowRankDelta = _residual(factors, model, str(path))
    else:
        delta, metadata = _from_dict(_tensors(data, str(path)), model, str(path))
    delta.check(model)
    return delta, metadata


def _checked_sizes(data: bytes, where: str) -> dict[str, int]:
    """Names in an archive and their sizes unpacked, all of them bounded."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            infos = archive.infolist()
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise UnsafeFileError(
            f"{where}: expected a ZIP archive (.delta, or .pt of torch 1.6 or later): {error}"
        ) from error
    sizes = {info.filename: info.file_size for info in infos}
    if len(sizes) < len(infos) or len(infos) > _MOST_FILES:
        raise UnsafeFileError(f"{where}: expected at most {_MOST_FILES} files with a name each")
    # Python bounds what comes out of these two while it unpacks, of the others only afterwards.
    plain = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
    if any(info.flag_bits & 1 or info.compress_type not in plain for info in infos):
        raise UnsafeFileError(f"{where}: expected files stored or deflated, without a password")
    if sum(sizes.values()) > LARGEST_UNPACKED:
        raise UnsafeFileError(
            f"{where}: expected at most {LARGEST_UNPACKED} bytes unpacked, got "
            f"{sum(sizes.values())}. It is not unpacked"
        )
    return sizes


def _read_archive(
    data: bytes, sizes: Mapping[str, int], where: str
) -> tuple[dict[int, tuple[Tensor, Tensor]], dict[str, Any]]:
    layers: dict[int, dict[str, str]] = {}
    for name in sizes:
        match = _FACTOR.fullmatch(name)
        if match:
            layers.setdefault(int(match["layer"]), {})[match["letter"]] = name
        elif name not in (*_VECTORS, "manifest.json"):
            raise UnsafeFileError(
                f"{where}: expected manifest.json, {', '.join(_VECTORS)} and factors, got "
                f"{name!r:.200}"
            )
    if sizes["manifest.json"] > _LARGEST_MANIFEST:
        raise UnsafeFileError(f"{where}: expected a manifest of at most {_LARGEST_MANIFEST} bytes")
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        parts = {name: _unpacked(archive, name, size, where) for name, size in sizes.items()}
    metadata = _manifest(parts["manifest.json"], sorted(layers), where)
    alone = [layer for layer, names in layers.items() if len(names) < 2]
    if alone:
        raise UnsafeFileError(f"{where}: layer {alone[0]}: expected both factors, got one")
    factors = {
        layer: tuple(_tensor(parts[names[x]], f"{where}: {names[x]}") for x in "AB")
        for layer, names in layers.items()
    }
    for name in set(_VECTORS).intersection(parts):
        _tensor(parts[name], f"{where}: {name}")
    return factors, metadata  # type: ignore[return-value]


def _unpacked(archive: zipfile.ZipFile, name: str, size: int, where: str) -> bytes:
    try:
        with archive.open(name) as file:
            # Never more than that, and an error where the directory lied about it.
            return file.read(size)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise UnsafeFileError(f"{where}: {name}: expected it whole: {error}") from error


def _manifest(data: bytes, layers: list[int], where: str) -> dict[str, Any]:
    try:
        manifest = parsed_json(data)
        version, named = manifest["format_version"], sorted(manifest["target_layers"])
    except (ValueError, TypeError, KeyError) as error:
        raise UnsafeFileError(f"{where}: manifest.json: expected a manifest, {error!r}") from error
    if version != "2.0" or named != layers or not layers:
        raise UnsafeFileError(
            f"{where}: manifest.json: expected format_version '2.0' and the layers that there are "
            f"factors of ({layers}), got {version!r:.40} and {named!r:.80}"
        )
    return dict(manifest)


def _from_dict(content: Any, model: nn.Module, where: str) -> tuple[LowRankDelta, dict[str, Any]]:
    if isinstance(content, Mapping):
        words = {k: v for k, v in content.items() if isinstance(v, str | int | float | bool)}
        if isinstance(content.get("factors"), Mapping):
            return _residual(content["factors"], model, where), words
        if isinstance(content.get("layer_deltas"), Mapping):
            return _linear(content["layer_deltas"], model, where), words
    raise UnsafeFileError(
        f"{where}: expected a dict with 'factors' or 'layer_deltas', got {type(content).__name__}"
    )


def _residual(factors: Mapping[Any, Any], model: nn.Module, where: str) -> ResidualDelta:
    blocks, width = decoder_layers(model), hidden_size(model)
    found = {}
    for layer, pair in factors.items():
        if type(layer) is not int or not 0 <= layer < len(blocks):
            raise IncompatibleBaseError(
                f"{where}: expected layers 0 to {len(blocks) - 1}, got {layer!r:.40}. The delta "
                "belongs to another base"
            )
        A, B = _transposed(pair, f"{where}: layer {layer}")
        if (A.shape[1], B.shape[0]) != (width, width):
            raise IncompatibleBaseError(
                f"{where}: layer {layer}: expected {width} features, got {A.shape[1]} and "
                f"{B.shape[0]}. The delta belongs to another base"
            )
        found[blocks[layer]] = (A, B)
    return _made(ResidualDelta, found, where)


def _linear(deltas: Mapping[Any, Any], model: nn.Module, where: str) -> LowRankDelta:
    found = {}
    for key, pair in deltas.items():
        match = _LAYER_KEY.fullmatch(key) if isinstance(key, str) else None
        if match is None:
            raise UnsafeFileError(f"{where}: expected keys layer_<i>_<map>, got {key!r:.80}")
        name = _map_name(model, int(match["layer"]), match["target"], where)
        found[name] = _transposed(pair, f"{where}: {key}")
    return _made(LowRankDelta, found, where)


def _map_name(model: nn.Module, layer: int, target: str, where: str) -> str:
    blocks = decoder_layers(model)
    names = _OTHER_NAMES.get(target, (target,))
    if layer < len(blocks):
        block = base_model(model).get_submodule(blocks[layer])
        for name, module in block.named_modules():
            if name.rpartition(".")[2] in names and is_linear(module):
                return f"{blocks[layer]}.{name}"
    raise IncompatibleBaseError(
        f"{where}: expected a map {' or '.join(names)} in layer {layer} of "
        f"{type(base_model(model)).__name__}, got none. The delta belongs to another base"
    )


def _transposed(pair: Any, where: str) -> tuple[Tensor, Tensor]:
    """Theirs are for rows, `h A B`; ours are `B' A' h`."""
    is_pair = isinstance(pair, list | tuple) and len(pair) == 2
    if not is_pair or not all(isinstance(x, Tensor) and x.ndim == 2 for x in pair):
        raise UnsafeFileError(f"{where}: expected two matrices, got {type(pair).__name__}")
    return pair[0].T.contiguous(), pair[1].T.contiguous()


def _made(kind: type[Any], factors: dict[str, tuple[Tensor, Tensor]], where: str) -> Any:
    try:
        return kind(factors)
    except ValidationError as error:
        raise UnsafeFileError(f"{where}: {error}") from error


def _tensor(data: bytes, where: str) -> Tensor:
    content = _tensors(data, where)
    if not isinstance(content, Tensor):
        raise UnsafeFileError(f"{where}: expected one tensor, got {type(content).__name__}")
    return content


def _tensors(data: bytes, where: str) -> Any:
    """What torch.save wrote, its tensors checked."""
    # Older files are pickles outright, and say themselves how much memory they want.
    _checked_sizes(data, where)
    try:
        content = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, KeyError) as error:
        raise UnsafeFileError(
            f"{where}: expected tensors and plain values, {str(error).splitlines()[0][:200]}"
        ) from error
    _check_tensors(content, where, 0)
    return content


def _check_tensors(content: Any, where: str, depth: int) -> None:
    if depth > 4:
        raise UnsafeFileError(f"{where}: expected factors by layer, got something nested deeper")
    if isinstance(content, Mapping):
        for value in content.values():
            _check_tensors(value, where, depth + 1)
    elif isinstance(content, list | tuple):
        for value in content:
            _check_tensors(value, where, depth + 1)
    elif isinstance(content, Tensor):
        # A view may claim more numbers than its storage has.
        bound = content.numel() * content.element_size()
        is_plain = content.layout == torch.strided and content.is_floating_point()
        if not is_plain or bound > content.untyped_storage().nbytes():
            raise UnsafeFileError(
                f"{where}: expected dense tensors of floats that fill their storage, got "
                f"{content.dtype} {list(content.shape)}"
            )
        if not content.isfinite().all():
            raise UnsafeFileError(f"{where}: expected finite numbers, got NaN or an infinity")
