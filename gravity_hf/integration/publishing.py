"""How a patched model reaches the Hub: `model.push_to_hub` ends in the publisher set here.

Pushing needs cards and checks, which stand on floors above this one. The facade, which may see
every floor, hands the publisher down; it is imported when it is first called.
"""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

Publisher = Callable[..., Any]

_publisher: Publisher | None = None


def set_publisher(publisher: Publisher) -> None:
    """Let `publish` end in `publisher(model, repo_id, **options)`."""
    global _publisher
    _publisher = publisher


def publish(model: Any, repo_id: str, **options: Any) -> Any:
    """Push `model` to the Hub in one commit; see `gravity_hf.push_gravity_model`."""
    if _publisher is None:
        raise RuntimeError(
            "push_to_hub: expected the library to be imported as gravity_hf, which says how models "
            "are pushed. import gravity_hf"
        )
    return _publisher(model, repo_id, **options)


def route_adapters(peft_model: Any, is_gravity: Callable[[Any], bool]) -> None:
    """Let `push_to_hub` of peft's model class end in the publisher for gravity adapters; others
    are pushed as before."""
    general = peft_model.push_to_hub

    @functools.wraps(general)
    def push_to_hub(self: Any, repo_id: str, **options: Any) -> Any:
        if is_gravity(self):
            return publish(self, repo_id, **options)
        return general(self, repo_id, **options)

    peft_model.push_to_hub = push_to_hub


def modification_times(folder: str | os.PathLike) -> dict[str, int]:
    """When each file directly in `folder` was last written, in nanoseconds; empty without one."""
    path = Path(folder)
    files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else []
    return {file.name: file.stat().st_mtime_ns for file in files}


def publish_saved(
    model: Any, folder: str | os.PathLike, before: Mapping[str, int], **options: Any
) -> Any:
    """Push what `model.save_pretrained(folder)` has written; other files there stay at home.

    `before`: `modification_times(folder)` from before it was saved.
    """
    repo_id = options.pop("repo_id", None) or Path(folder).resolve().name
    now = modification_times(folder)
    with tempfile.TemporaryDirectory(prefix=".gravity-push-", dir=folder) as scratch:
        for name in (name for name, time in now.items() if before.get(name) != time):
            _link(Path(folder, name), Path(scratch, name))
        return publish(model, repo_id, folder=scratch, **options)


def _link(source: Path, target: Path) -> None:
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copy2(source, target)
