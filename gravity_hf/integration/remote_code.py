"""`modeling_gravity.py`, the file that travels with every exported checkpoint."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path

REMOTE_CODE_MODULE = "modeling_gravity"


def copy_remote_code(folder: str | os.PathLike) -> None:
    """Put `modeling_gravity.py` into `folder`, whole or not at all."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{REMOTE_CODE_MODULE}.py"
    temporary = folder / f".{name}.tmp"
    temporary.write_text(files("gravity_hf._remote_code").joinpath(name).read_text("utf-8"))
    temporary.replace(folder / name)
