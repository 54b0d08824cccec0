"""How the versions of a key follow each other: changes of entries, without any file."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

from .errors import DuplicateKeyError, UnknownKeyError, ValidationError
from .manifest import LONGEST_KEY, Entry, Manifest, file_name

Entries = dict[str, Entry]


@dataclass(frozen=True)
class Version:
    """One line of a key's history; the fields are those of `manifest.Entry`."""

    key: str
    version: int
    id: str
    state: str
    created: str
    parents: tuple[str, ...]
    metrics: dict[str, Any]


def history_of(manifest: Manifest, key: str) -> list[Version]:
    """Every version that `key` ever had, oldest first. UnknownKeyError where it had none."""
    return [
        Version(e.key, e.version, e.id, e.state, e.created, e.parents, dict(e.metrics))
        for e in _known(manifest, key)
    ]


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def check_key(key: object) -> str:
    """A key: printable text, not empty, of at most 512 characters. ValidationError for others."""
    fits = isinstance(key, str) and 0 < len(key) <= LONGEST_KEY
    if not fits or not key.isprintable() or key != key.strip():  # type: ignore[attr-defined]
        raise ValidationError(
            f"key: expected printable text of 1 to {LONGEST_KEY} characters without spaces around "
            f"it, such as 'geo/france', got {key!r:.80}"
        )
    return key  # type: ignore[return-value]


def check_new(manifest: Manifest, key: str) -> None:
    """Raise DuplicateKeyError where `key` is in force."""
    if key in manifest.active:
        raise DuplicateKeyError(
            f"{key!r}: expected a key that the store does not have, got one that it has. Use "
            "update for another answer, or remove it first"
        )


def active_entry(manifest: Manifest, key: str) -> Entry:
    """The version of `key` in force. UnknownKeyError where there is none."""
    entry = manifest.active.get(key)
    if entry is None:
        entries = manifest.of_key(key)
        hint = (
            f"it was {entries[-1].state}; rollback brings back an earlier version"
            if entries
            else "see keys() for those that it has"
        )
        raise UnknownKeyError(f"{key!r}: expected a key in force in the store: {hint}")
    return entry


def version_entry(manifest: Manifest, key: str, version: int) -> Entry:
    """A version of `key` that still has its file. UnknownKeyError otherwise."""
    entries = _known(manifest, key)
    entry = next((e for e in entries if e.version == version), None)
    if entry is None or entry.state == "purged":
        there = [e.version for e in entries if e.state != "purged"]
        raise UnknownKeyError(
            f"{key!r}: expected one of the versions {there}, got {version!r}"
            f"{', which was purged' if entry else ''}. See history({key!r})"
        )
    return entry


def next_version(
    manifest: Manifest, key: str, sha: str, metrics: Mapping[str, Any], parents: tuple[str, ...]
) -> tuple[Entries, Entry]:
    """Entries with a new version of `key` in force, and its entry. Older ones stay as history."""
    earlier = manifest.of_key(key)
    version = earlier[-1].version + 1 if earlier else 1
    belief_id = uuid.uuid4().hex
    files = {file_name(belief_id, version): sha}
    new = Entry(belief_id, key, version, "active", files, parents, dict(metrics), now())
    return {**_superseded(manifest.entries, key), belief_id: new}, new


def without_key(manifest: Manifest, key: str, purge: bool) -> Entries:
    """Entries with `key` removed: its version in force a tombstone, or all of them purged."""
    entries = dict(manifest.entries)
    if purge:
        for entry in _known(manifest, key):
            entries[entry.id] = replace(entry, state="purged", metrics={})
    else:
        entry = active_entry(manifest, key)
        entries[entry.id] = replace(entry, state="removed")
    return entries


def _superseded(entries: Mapping[str, Entry], key: str) -> Entries:
    older = {
        i: replace(e, state="superseded")
        for i, e in entries.items()
        if e.key == key and e.state == "active"
    }
    return {**entries, **older}


def _known(manifest: Manifest, key: str) -> list[Entry]:
    entries = manifest.of_key(key)
    if not entries:
        raise UnknownKeyError(
            f"{key!r}: expected a key of the store, got one that it never had. See keys()"
        )
    return entries
