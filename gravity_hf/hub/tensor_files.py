"""The tensors of an export by name and shape, read from the headers of its safetensors files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

Shapes = dict[str, tuple[int, ...]]


def shapes_of_export(folder: Path, stem: str) -> Shapes:
    """Names and shapes of `<stem>.safetensors` or of the shards that its index lists.

    Raises:
        ValueError: no weights, a shard that is missing, cut short, not in the index, or without
            a tensor that the index promises.
    """
    index_file = folder / f"{stem}.safetensors.index.json"
    single = folder / f"{stem}.safetensors"
    if not index_file.is_file():
        if not single.is_file():
            raise ValueError(
                f"{folder}: expected {single.name} or {index_file.name}, found neither. Write them "
                "with model.save_pretrained"
            )
        _refuse_strays(folder, stem, {single.name})
        return _shapes_in(single)
    weight_map = read_json(index_file).get("weight_map") or {}
    names = sorted(set(weight_map.values()))
    missing = [name for name in names if not (folder / name).is_file()]
    if missing or not names:
        raise ValueError(
            f"{folder}: expected the {len(names)} shards that {index_file.name} lists, "
            f"{len(missing)} are missing, such as {missing[:1]}. Save or download the model again"
        )
    _refuse_strays(folder, stem, set(names))
    shapes: Shapes = {}
    for name in names:
        shapes.update(_shapes_in(folder / name))
    absent = sorted(set(weight_map) - set(shapes))
    if absent:
        raise ValueError(
            f"{folder}: expected every tensor of {index_file.name}, {len(absent)} are in no shard, "
            f"such as {absent[0]}. The shards belong to another save: save the model again"
        )
    return shapes


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        ValueError: the file holds anything else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got something else ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content


def _shapes_in(file: Path) -> Shapes:
    try:
        with safe_open(file, framework="pt") as tensors:
            names = list(tensors.keys())
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
    except SafetensorError as error:
        raise ValueError(
            f"{file}: expected a whole safetensors file, got one that cannot be read ({error}). "
            "Save or download the model again"
        ) from error


def _refuse_strays(folder: Path, stem: str, expected: set[str]) -> None:
    strays = sorted({file.name for file in folder.glob(f"{stem}*.safetensors")} - expected)
    if strays:
        raise ValueError(
            f"{folder}: expected the weights of one save, got {strays} beside "
            f"{sorted(expected)[0]}. Move away what is left from an earlier save"
        )
