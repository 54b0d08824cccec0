"""Output folders that are either complete or not there."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def require_free(out: Path, force: bool) -> None:
    """Refuse an `out` that holds anything, unless `force` and what it holds is a model."""
    if out.is_file():
        raise ValueError(f"OUT: expected a folder, {str(out)!r} is a file. Choose another name")
    if not out.exists() or not any(out.iterdir()):
        return
    if not force:
        raise ValueError(
            f"OUT: expected a new or empty folder, {str(out)!r} is not empty. Choose another name, "
            "or say force (--force) to replace the model in it"
        )
    if not (out / "config.json").is_file():
        raise ValueError(
            f"OUT: force replaces model folders only, {str(out)!r} has no config.json. Choose "
            "another name, or empty it yourself"
        )


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `out`; it takes the place of `out` only if all went well."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as room:
        building = Path(room, "new")
        building.mkdir()
        yield building
        replaced = Path(room, "old")
        if out.exists():
            # Out of the way first: a folder cannot be renamed onto one that holds files.
            out.rename(replaced)
        try:
            building.rename(out)
        except OSError:
            if replaced.exists():
                replaced.rename(out)
            raise
