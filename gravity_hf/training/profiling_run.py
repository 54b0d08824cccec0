"""Profiling a model that lies on disk or on the Hub: the work behind the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .any_model import load_any_model, load_any_tokenizer
from .files import write_json
from .profiling import ProfileSettings, profile_model
from .profiling_manifest import check_place, folder_digest
from .text import read_texts
from .tokenizing import text_pieces

__all__ = ["ProfileSettings", "profile_folder"]


def profile_folder(
    name: str,
    settings: ProfileSettings | None = None,
    *,
    tiers: list[str] | None = None,
    text: list[Path] | None = None,
    dtype: str = "auto",
    device: str | None = None,
    out: Path | None = None,
    progress: bool | None = None,
) -> dict[str, Any]:
    """`profile_model` of a folder or Hub name, with the `digest` of the folder and its `text`.

    Args:
        text: files; None: the help text that Python carries.
        out: where to write the manifest; None: nowhere.

    Raises:
        ValueError: no such model, too little text, a tier that there is not, or a manifest that
            would count as a part of the model.
    """
    settings = settings or ProfileSettings()
    folder = Path(name).expanduser()
    if out is not None:
        check_place(out, folder)
    content = read_texts(text)
    model = load_any_model(name, dtype, device)
    tokenizer = load_any_tokenizer(name)
    ids = _ids(tokenizer, content, settings)
    manifest = profile_model(
        model, ids, settings, tiers=tiers, name=Path(name).name, progress=progress
    )
    manifest["digest"] = folder_digest(folder) if folder.is_dir() else None
    files = [file.name for file in text or ()]
    manifest["text"] = ", ".join(files) or "Python's help text"
    if out is not None:
        write_json(out, manifest)
    return manifest


def _ids(tokenizer: Any, text: str, settings: ProfileSettings) -> torch.Tensor:
    """As much of the text as is read, four times over: windows are spread."""
    enough = 4 * settings.windows * (settings.prompt_length + settings.tokens)
    ids: list[int] = []
    for piece in text_pieces(text):
        ids += tokenizer(piece, add_special_tokens=False, verbose=False)["input_ids"]
        if len(ids) >= enough:
            break
    return torch.tensor(ids[:enough], dtype=torch.long)
