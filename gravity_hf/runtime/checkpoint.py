"""Checkpoints of runtime modules: a folder with safetensors and JSON, nothing that runs code."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from .encoding import json_value, strict_json

WEIGHTS_FILE = "model.safetensors"
STATE_FILE = "victoros.json"
_FORMAT = 1


def write_checkpoint(
    path: str | os.PathLike[str], content: Mapping[str, Any], model: nn.Module | None
) -> None:
    """Write the folder under another name first, then rename it.

    Raises:
        TypeError: `content` has no JSON form.
        FileExistsError: `path` is there and no checkpoint.
    """
    path = Path(path).absolute()
    text = strict_json(json_value({"format": _FORMAT, **content}, "checkpoint"))
    if path.exists() and not _is_checkpoint(path):
        raise FileExistsError(
            f"save_checkpoint: expected a new path or a folder with {STATE_FILE}, got {str(path)!r}"
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
        new.rename(path)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """`ledger_snapshot`, `extra` and, where there is one, `model_state_dict`, on the CPU.

    Raises:
        ValueError: it is neither a folder of `write_checkpoint` nor a published `.pt` file.
    """
    path = Path(path)
    if path.is_file():
        content = _read_published(path)
    elif _is_checkpoint(path):
        content = json.loads((path / STATE_FILE).read_text(encoding="utf-8"))
        if content.get("format") != _FORMAT:
            raise ValueError(
                f"load_checkpoint: {path}: expected format {_FORMAT}, got "
                f"{content.get('format')!r}: written by a newer gravity_hf"
            )
        if (path / WEIGHTS_FILE).is_file():
            content["model_state_dict"] = load_file(path / WEIGHTS_FILE)
    else:
        raise ValueError(
            f"load_checkpoint: expected a folder with {STATE_FILE} or a .pt file, got {str(path)!r}"
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
