"""Which files of an exported folder go to the Hub, and which folder must not go there at all."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

# Formats that run code when they are opened, or that transformers opens with pickle.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib", ".msgpack", ".h5")
# Where `gravity-hf convert` keeps its steps.
WORK_FOLDER = "work"
_CACHES = ("__pycache__",)

# One token is a secret, several are a vocabulary: `added_tokens.json` is not meant.
_SECRET_NAME = re.compile(
    r"(^|[._-])(token|secrets?|passwords?|credentials?|api_?key|id_rsa|id_ed25519)([._-]|$)"
    r"|\.(pem|key|p12)$",
    re.IGNORECASE,
)
_SECRET_TEXT = re.compile(rb"\bhf_[A-Za-z0-9]{30,}\b")
_TEXTS = (".json", ".md", ".txt", ".yaml", ".yml", ".py", ".jinja", ".csv")
_LONGEST_TEXT = 2**20


@dataclass(frozen=True)
class Contents:
    """`files`: paths relative to the folder, in order. `left_out`: names that stay at home."""

    files: tuple[PurePosixPath, ...]
    left_out: tuple[str, ...]


def contents_of(folder: Path) -> Contents:
    """What of `folder` goes to the Hub: everything but hidden files, caches and `work/`.

    Raises:
        ValueError: it holds a pickle, a link that leads out of it, or what looks like a secret.
    """
    if not folder.is_dir():
        raise ValueError(f"expected a folder that holds an exported model, got {str(folder)!r}")
    files: list[PurePosixPath] = []
    left_out: list[str] = []
    for path in _walk(folder, folder.resolve(), left_out):
        relative = PurePosixPath(path.relative_to(folder).as_posix())
        _refuse_unsafe(folder, path, relative)
        files.append(relative)
    return Contents(tuple(sorted(files)), tuple(sorted(left_out)))


def _walk(folder: Path, root: Path, left_out: list[str], inside: str = "") -> Iterator[Path]:
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        name = inside + entry.name
        hidden = entry.name.startswith(".") or entry.name in _CACHES
        if hidden or (name == WORK_FOLDER and entry.is_dir()):
            left_out.append(name + "/" if entry.is_dir(follow_symlinks=False) else name)
            continue
        path = Path(entry.path)
        if entry.is_symlink() and (path.is_dir() or root not in path.resolve().parents):
            raise ValueError(
                f"{path}: expected a file, got a link to {path.resolve()}, which is not in the "
                f"folder. Copy the folder with its files, for example: cp -rL {folder} copy"
            )
        if entry.is_dir():
            yield from _walk(path, root, left_out, name + "/")
        elif entry.is_file():
            yield path


def _refuse_unsafe(folder: Path, path: Path, relative: PurePosixPath) -> None:
    if relative.suffix.lower() in PICKLES:
        raise ValueError(
            f"{folder}: expected safetensors only, got {relative}: a file of this kind can run "
            "code on the machine of whoever loads it. Move it out of the folder; weights are "
            "written by model.save_pretrained"
        )
    if _SECRET_NAME.search(relative.name):
        raise ValueError(
            f"{folder}: expected nothing secret, got {relative}, which by its name holds a "
            "password or a token. Move it out of the folder, or rename it"
        )
    is_text = relative.suffix.lower() in _TEXTS and path.stat().st_size <= _LONGEST_TEXT
    if is_text and (found := _SECRET_TEXT.search(path.read_bytes())):
        raise ValueError(
            f"{folder}: expected nothing secret, got {relative} with a Hub token in it "
            f"({found[0][:6].decode()}...). Remove it there, and revoke the token at "
            "https://huggingface.co/settings/tokens if others could read the file"
        )
