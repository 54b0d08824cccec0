"""Checkpoints of the training loop: whole folders that a run can be continued from bit for bit."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_model, save_model
from torch import nn

from ..runtime.growth import has_curvature
from .files import write_json
from .folders import whole_folder

MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.pt"
CONFIG_FILE = "config.json"
STATE_FILE = "loop.json"
# Of a config: what changes nothing that is computed.
_NO_SETTINGS = {"_name_or_path", "architectures", "dtype", "transformers_version", "use_cache"}
_NAME = re.compile(r"step-(\d+)")


def save_checkpoint(
    folder: Path, model: nn.Module, parts: Mapping[str, Any], state: Mapping[str, Any]
) -> Path:
    """Write `folder` anew: it is there whole or not at all.

    Args:
        folder: what to write.
        model: its tensors go into `model.safetensors`, its config, if any, beside them.
        parts: what has a `state_dict`, such as optimiser and scheduler, or None. Together with the
            states of the random number generators they go into `optimizer.pt`.
        state: JSON-able, into `loop.json`.

    Raises:
        FileExistsError: `folder` holds other files, which would be lost.
    """
    own = {MODEL_FILE, OPTIMIZER_FILE, STATE_FILE, CONFIG_FILE}
    foreign = sorted({file.name for file in folder.iterdir()} - own if folder.is_dir() else ())
    if foreign:
        raise FileExistsError(
            f"TrainingLoop.save: expected a checkpoint alone in {str(folder)!r}, which is replaced "
            f"as a whole, got {', '.join(foreign[:3])}. Move that, or choose another folder"
        )
    record_streams: Any = getattr(model, "record_streams", None)
    if record_streams is not None:
        record_streams()  # a tri-model's config must say what its streams have become
    with whole_folder(folder) as building:
        save_model(model, str(building / MODEL_FILE), metadata={"format": "pt"})
        config: Any = getattr(model, "config", None)
        if hasattr(config, "save_pretrained"):
            config.save_pretrained(building)
        tensors = {name: part.state_dict() for name, part in parts.items() if part is not None}
        torch.save({**tensors, "random": random_states()}, building / OPTIMIZER_FILE)
        write_json(building / STATE_FILE, dict(state))
    return folder


def load_checkpoint(
    folder: Path, model: nn.Module, parts: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a folder of `save_checkpoint` into `model` and `parts`, in place. The curvature of a
    model is no tensor: it comes from the config.

    Returns:
        The `state`, and the states for `set_random_states`, which the caller sets last.

    Raises:
        FileNotFoundError: a file is missing.
        ValueError: it was saved with other parts, or of a model with other settings.
        RuntimeError: the model is another one; nothing of `parts` is changed.
    """
    for name in (MODEL_FILE, OPTIMIZER_FILE, STATE_FILE):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder}: expected a checkpoint of TrainingLoop, got a folder without {name}"
            )
    state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    tensors = torch.load(folder / OPTIMIZER_FILE, map_location="cpu", weights_only=True)
    generators = tensors.pop("random")
    given = {name: part for name, part in parts.items() if part is not None}
    if set(tensors) != set(given):
        raise ValueError(
            f"{folder}: expected a checkpoint with {sorted(given)}, got {sorted(tensors)}. Resume "
            "with the parts that it was made with"
        )
    curvature = _saved_curvature(folder, model)
    device = next((str(p.device) for p in model.parameters()), "cpu")
    load_model(model, folder / MODEL_FILE, device=device)
    if curvature is not None:
        model.curvature = curvature  # type: ignore[assignment]
    for name, part in given.items():
        part.load_state_dict(tensors[name])
    return state, generators


def _saved_curvature(folder: Path, model: nn.Module) -> float | None:
    """What the curvature of `model` had come to, where it is another one now.

    Raises:
        ValueError: other settings than that differ.
    """
    own: Any = getattr(model, "config", None)
    if not hasattr(own, "from_json_file") or not (folder / CONFIG_FILE).is_file():
        return None
    saved = type(own).from_json_file(folder / CONFIG_FILE)
    then, now = (json.loads(x.to_json_string(use_diff=False)) for x in (saved, own))
    different = [
        name
        for name in then
        if name not in _NO_SETTINGS and then[name] != now.get(name, then[name])
    ]
    if different == ["curvature"] and has_curvature(model):
        return float(then["curvature"])
    if different:
        name = different[0]
        raise ValueError(
            f"{folder}: expected a checkpoint of a model with the same {', '.join(different)}, got "
            f"{name} {then[name]!r} there and {now[name]!r} here. Make the model as it was then"
        )
    return None


def latest_checkpoint(folder: Path) -> Path:
    """The newest checkpoint in `folder`.

    Raises:
        FileNotFoundError: there is none.
    """
    found = {
        int(match[1]): path
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _NAME.fullmatch(path.name)) and path.is_dir()
    }
    if not found:
        raise FileNotFoundError(
            f"{str(folder)!r}: expected a checkpoint step-<n> to resume from, got none. Check "
            "checkpoint_dir, or start with resume=False"
        )
    return found[max(found)]


def checkpoint_name(step: int) -> str:
    return f"step-{step}"


def random_states() -> dict[str, Any]:
    """Of Python's, numpy's and torch's generators; torch.load reads them with weights_only."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    return {
        "python": random.getstate(),
        "numpy": (str(kind), [int(key) for key in keys], *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_random_states(states: Mapping[str, Any]) -> None:
    """Undo what happened to the generators since `random_states`."""
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])
