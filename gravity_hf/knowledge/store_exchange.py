"""Deltas that come into a store from other programs' files, and those that go out to peft."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from .belief import Belief
from .errors import UnsafeFileError, ValidationError
from .facts import Fact

if TYPE_CHECKING:
    from .store import BeliefStore
    from .store_reader import StoreReader

_Path = str | os.PathLike[str]


def export_peft(store: StoreReader, key: str, directory: _Path) -> None:
    """See `BeliefStore.export_peft`."""
    from .peft_adapters import export_adapter

    belief = store.get(key)
    content = {
        "key": key,
        "fact": None if belief.fact is None else belief.fact.to_row(),
        "metadata": belief.metadata,
        "report": belief.report,
    }
    export_adapter(store.model, belief.delta, directory, content)


def import_peft(store: BeliefStore, directory: _Path, key: str | None) -> Belief:
    """See `BeliefStore.import_peft`."""
    from .adapter_files import read_adapter

    delta, content = read_adapter(directory)
    name = _named(key, content.get("key"), directory)
    try:
        values = content.get("fact")
        fact = None if values is None else Fact.from_row(values, where="the adapter's fact")
        metadata, report = (dict(content.get(x) or {}) for x in ("metadata", "report"))
    except (TypeError, ValueError, AttributeError) as error:
        raise UnsafeFileError(
            f"import_peft: {os.fspath(directory)}: expected a belief beside the adapter, got "
            f"something else: {error}"
        ) from error
    return store.add_delta(name, delta, metadata, fact, report)


def import_published(store: BeliefStore, file: _Path, key: str | None) -> Belief:
    """See `BeliefStore.import_published`."""
    from .published_delta import read_published

    delta, metadata = read_published(file, store.model)
    name = _named(key, metadata.get("delta_id") or metadata.get("name"), file)
    return store.add_delta(name, delta, metadata)


def _named(key: str | None, default: Any, where: _Path) -> str:
    name = key or default
    if not isinstance(name, str):
        raise ValidationError(
            f"import: {os.fspath(where)}: expected key=..., got none, and the file names none"
        )
    return name
