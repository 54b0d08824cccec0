"""Features of a host in a folder: written whole, read a window at a time."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from ...models.geolip.features import FeatureWindow
from ..files import write_json
from ..folders import whole_folder

__all__ = ["MANIFEST_FILE", "StoredFeatures", "holds", "store_features"]

MANIFEST_FILE = "features.json"
_FORMAT = 1
# Of a file; a window is never divided.
_FILE_BYTES = 64 * 2**20


class StoredFeatures(Dataset):
    """Windows of features in a folder, read when they are asked for: rows for GeolipCollator.

    Args:
        folder: as `store_features` wrote it.
        chosen: which windows, by their numbers. None: all.

    Raises:
        ValueError: a folder that is not whole, or other files in it than it was written with.
    """

    def __init__(self, folder: Path, chosen: Sequence[int] | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = _manifest(self.folder)
        self.chosen = range(self.manifest["windows"]) if chosen is None else list(chosen)
        self._places = [
            (number, start, length)
            for number, file in enumerate(self.manifest["files"])
            for start, length in zip(_starts(file["lengths"]), file["lengths"], strict=True)
        ]
        self._open: dict[int, Any] = {}

    @property
    def text_indices(self) -> list[int]:
        """Of each chosen window: which text it is of."""
        of_all = [i for file in self.manifest["files"] for i in file["texts"]]
        return [of_all[i] for i in self.chosen]

    def part(self, numbers: Sequence[int]) -> StoredFeatures:
        """Of these rows, in this order."""
        return StoredFeatures(self.folder, [self.chosen[i] for i in numbers])

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        number, start, length = self._places[self.chosen[index]]
        return {"patches": self._file(number).get_slice("features")[start : start + length]}

    def _file(self, number: int) -> Any:
        # Opened by each process for itself; what is mapped is not copied.
        if number not in self._open:
            file = self.folder / self.manifest["files"][number]["name"]
            self._open[number] = safe_open(file, framework="pt").__enter__()
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}


def store_features(folder: Path, windows: Iterable[FeatureWindow], key: Mapping[str, Any]) -> None:
    """Write windows into `folder`, whole or not at all, a few of them in memory at a time.

    Args:
        folder: replaced if it is there.
        windows: `features` `[n, C]` and `text_index` of each.
        key: what they are features of, JSON-able; see `stored_features`.

    Raises:
        ValueError: no windows.
    """
    files: list[dict[str, Any]] = []
    with whole_folder(Path(folder)) as room:
        for number, part in enumerate(_parts(windows)):
            name = f"features-{number:05d}.safetensors"
            tensor = torch.cat([window.features for window in part]).contiguous()
            save_file({"features": tensor}, room / name)
            files.append(
                {
                    "name": name,
                    "bytes": (room / name).stat().st_size,
                    "lengths": [len(window.features) for window in part],
                    "texts": [window.text_index for window in part],
                }
            )
        if not files:
            raise ValueError("features: expected at least one window, got none. Give more text")
        manifest = {
            "format": _FORMAT,
            "key": dict(key),
            "windows": sum(len(file["lengths"]) for file in files),
            "tokens": sum(sum(file["lengths"]) for file in files),
            "files": files,
        }
        write_json(room / MANIFEST_FILE, {**manifest, "digest": _digest(key)})


def holds(folder: Path, key: Mapping[str, Any]) -> bool:
    """Whether the folder has just these features, as far as names and sizes of files say."""
    try:
        found = StoredFeatures(folder)
        for number in range(len(found.manifest["files"])):
            found._file(number)
    except (ValueError, SafetensorError):
        return False
    return found.manifest["digest"] == _digest(key)


def _parts(windows: Iterable[FeatureWindow]) -> Iterator[list[FeatureWindow]]:
    part: list[FeatureWindow] = []
    size = 0
    for window in windows:
        part.append(window)
        size += window.features.nbytes
        if size >= _FILE_BYTES:
            yield part
            part, size = [], 0
    if part:
        yield part


def _starts(lengths: Sequence[int]) -> Iterator[int]:
    start = 0
    for length in lengths:
        yield start
        start += length


def _manifest(folder: Path) -> dict[str, Any]:
    file = folder / MANIFEST_FILE
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        if manifest["format"] != _FORMAT:
            raise ValueError(f"format {manifest['format']}")
        for part in manifest["files"]:
            size = (folder / part["name"]).stat().st_size
            if size != part["bytes"]:
                raise ValueError(f"{part['name']} has {size} bytes, not {part['bytes']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}: expected features of format {_FORMAT}, whole, got something else "
            f"({error}). Delete the folder, and extract them again"
        ) from error
    return manifest


def _digest(key: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:16]
