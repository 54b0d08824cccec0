"""The modules that sentence-transformers puts behind a model, each in a folder of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MODULES_FILE = "modules.json"

_CARRIED = (".json", ".txt", ".safetensors")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def module_files(folder: Path) -> list[Path]:
    """Settings and safetensors in the folders that `modules.json` names; none without that file.

    What has no settings, such as a normalisation, may have no folder.

    Raises:
        ValueError: a module that comes with code, with pickled weights alone or with folders of
            its own, or a `modules.json` that is not one.
    """
    file = folder / MODULES_FILE
    if not file.is_file():
        return []
    found: list[Path] = []
    for module in _modules(file):
        code = folder / f"{module['type'].split('.')[0]}.py"
        if code.is_file():
            raise _refused(folder, f"{code.name}, the code of a module, which it does not carry")
        if module["path"] not in ("", "."):
            found += _carried(folder, folder / module["path"])
    return found


def known_module_files(folder: Path) -> list[Path]:
    """The same; none where they cannot be told from other files."""
    try:
        return module_files(folder)
    except ValueError:
        return []


def _modules(file: Path) -> list[dict[str, str]]:
    try:
        modules: Any = json.loads(file.read_text(encoding="utf-8"))
        found = [{"path": m["path"], "type": m["type"]} for m in modules]
        inside = all(m["path"] in ("", ".", Path(m["path"]).name) for m in found)
        texts = all(isinstance(text, str) for m in found for text in m.values())
    except (ValueError, TypeError, KeyError) as error:
        raise _not_modules(file) from error
    if not (inside and texts) or any(m["path"] == ".." for m in found):
        raise _not_modules(file)
    return found


def _not_modules(file: Path) -> ValueError:
    return ValueError(
        f"export: expected modules with a type and a path, the name of a folder beside it, in "
        f"{str(file)!r}. Save the model anew: SentenceTransformer(folder).save_pretrained(...)"
    )


def _carried(folder: Path, room: Path) -> list[Path]:
    if not room.is_dir():
        return []
    files = sorted(room.iterdir())
    others = [f for f in files if f.is_dir() or f.suffix == ".py"]
    if not any(f.suffix == ".safetensors" for f in files):
        others += [f for f in files if f.suffix in _PICKLES]
    if others:
        raise _refused(folder, ", ".join(str(f.relative_to(folder)) for f in others))
    return [f for f in files if f.suffix in _CARRIED]


def _refused(folder: Path, what: str) -> ValueError:
    return ValueError(
        f"export: expected modules of settings and safetensors behind the model in "
        f"{str(folder)!r}, got {what}. Save it anew with sentence-transformers, which writes "
        "safetensors: SentenceTransformer(folder).save_pretrained(...); or export a folder with "
        "the model alone, without modules.json"
    )
