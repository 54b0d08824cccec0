"""How files name the models that stand beside them."""

from __future__ import annotations

import os


def lasting_name(name: str | None) -> str | None:
    """A name on the Hub as it is; of a folder its absolute path, so that it is found from any
    working directory and taken for no name; None for none."""
    if not name:
        return None
    return os.path.abspath(name) if os.path.isdir(name) else name


__all__ = ["lasting_name"]
