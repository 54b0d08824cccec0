"""Checkpoints of runtime modules: a folder with safetensors and JSON, nothing that runs code."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from .encoding import json_value, parsed_json, strict_json

WEIGHTS_FILE = "model.safetensors"
STATE_FILE = "victoros.json"
_FORMAT = 1
_DAMAGED = ". The file is damaged: load another checkpoint"


def write_checkpoint(
    path: str | os.PathLike[str], content: Mapping[str, Any], model: nn.Module | None
) -> None:
    """Write the folder under another name first, then rename it.

    Raises:
        TypeError: `content` has no JSON form.
        FileExistsError: `path` is there and no checkpoint, or one with other files in it.
    """
    # What a link leads to: the link stays.
    path = Path(path).resolve()
    text = strict_json(json_value({"format": _FORMAT, **content}, "checkpoint"))
    if path.exists() and not _is_checkpoint(path):
        raise FileExistsError(
            f"save_checkpoint: expected a new path or a folder with {STATE_FILE}, got {str(path)!r}"
        )
    foreign = _foreign(path)
    if foreign:
        raise FileExistsError(
            f"save_checkpoint: expected a checkpoint alone in {str(path)!r}, which is replaced "
            f"as a whole, got {', '.join(foreign[:3])} beside it. Move that, or choose another path"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        new, old = unfinished / "new", unfinished / "old"
        new.mkdir()
        if model is not None:
            save_model(model, str(new / WEIGHTS_FILE))
        (new / STATE_FILE).write_text(text + "\n", encoding="utf-8")
        if path.exists():
            path.rename(old)
        try:
            new.rename(path)
        except OSError:
            if old.exists():
                old.rename(path)
            raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """`ledger_snapshot`, `extra` and, where there is one, `model_state_dict`, on the CPU.

    Raises:
        ValueError: it is neither a folder of `write_checkpoint` nor a published `.pt` file, or a
            damaged one.
    """
    path = Path(path)
    if path.is_file():
        content = _read_published(path)
    elif _is_checkpoint(path):
        content = _read_state(path / STATE_FILE)
        if content.get("format") != _FORMAT:
            raise ValueError(
                f"load_checkpoint: {path}: expected format {_FORMAT}, got "
                f"{content.get('format')!r}: written by a newer gravity_hf"
            )
        if (path / WEIGHTS_FILE).is_file():
            content["model_state_dict"] = _read_weights(path / WEIGHTS_FILE)
    else:
        raise ValueError(
            f"load_checkpoint: expected a folder with {STATE_FILE} or a .pt file, got {str(path)!r}"
        )
    weights = content.get("model_state_dict", {})
    if not isinstance(weights, Mapping) or not all(
        isinstance(name, str) and isinstance(x, Tensor) for name, x in weights.items()
    ):
        raise ValueError(
            f"load_checkpoint: {path}: model_state_dict: expected tensors by name, got "
            f"{weights!r:.80}. Save the state_dict of the model"
        )
    return content


def restore_weights(
    model: nn.Module, weights: Mapping[str, Tensor], source: str | os.PathLike[str]
) -> None:
    """Load `weights` into `model`, strictly; tied tensors may be there once.

    Raises:
        ValueError: names or shapes differ; nothing is changed.
    """
    own = model.state_dict()
    places = {name: (x.data_ptr(), x.shape, x.stride()) for name, x in own.items()}
    given = {places[name] for name in weights if name in places}
    missing = [n for n in own if n not in weights and places[n] not in given]
    foreign = [n for n in weights if n not in own]
    other = [n for n in own if n in weights and own[n].shape != weights[n].shape]
    for what, names in (("without", missing), ("unknown", foreign), ("of another shape", other)):
        if names:
            raise ValueError(
                f"load_checkpoint: {source} is not of this {type(model).__name__}: {what} "
                f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}. A published LGT is "
                "converted first: gravity_hf.models.lgt.convert_lgt"
            )
    model.load_state_dict(dict(weights), strict=False)


def _is_checkpoint(path: Path) -> bool:
    return path.is_dir() and (path / STATE_FILE).is_file()


def _foreign(path: Path) -> list[str]:
    """Names in the folder that no checkpoint has."""
    found = path.iterdir() if path.is_dir() else ()
    return sorted({file.name for file in found} - {STATE_FILE, WEIGHTS_FILE})


def _read_state(file: Path) -> dict[str, Any]:
    try:
        content = parsed_json(file.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"load_checkpoint: {file}: expected JSON, got {error}{_DAMAGED}"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(
            f"load_checkpoint: {file}: expected an object, got {content!r:.60}{_DAMAGED}"
        )
    missing = [name for name in ("format", "ledger_snapshot", "extra") if name not in content]
    if missing:
        raise ValueError(f"load_checkpoint: {file}: expected {missing[0]}, got none{_DAMAGED}")
    return content


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(
            f"load_checkpoint: {file}: expected safetensors, got {error}{_DAMAGED}"
        ) from error


def _read_published(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"load_checkpoint: {path}: expected a published checkpoint that holds tensors and "
            f"plain values only, got {type(error).__name__}. It was not run"
        ) from error
    if not isinstance(content, dict) or "ledger_snapshot" not in content:
        raise ValueError(
            f"load_checkpoint: {path}: expected ledger_snapshot, extra and model_state_dict, got "
            f"{sorted(map(str, content)) if isinstance(content, dict) else type(content).__name__}"
        )
    return content
