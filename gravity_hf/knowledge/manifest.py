"""The manifest of a store: which versions of which keys there are, and the digests of their files.

It is the one file whose renaming makes a change real, and its names are the only ones that a store
reads, writes or deletes.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from ..runtime.encoding import parsed_json, strict_json
from .errors import UnsafeFileError

FORMAT = "gravity-kb/1"
STATES = ("active", "superseded", "removed", "purged")
LONGEST_KEY = 512
_ID = re.compile("[0-9a-f]{32}")
_SHA = re.compile("[0-9a-f]{64}")


@dataclass(frozen=True)
class Entry:
    """One version of one key.

    Attributes:
        state: "active" (the one in force), "superseded" by a later version, "removed" with its key
            (it can come back), or "purged" (its file is deleted).
        files: name in the store's folder -> SHA-256, hex.
        parents: ids of the versions that it was made from.
        metrics: the numbers of its report.
        created: ISO 8601, UTC.
    """

    id: str
    key: str
    version: int
    state: str
    files: dict[str, str]
    parents: tuple[str, ...] = ()
    metrics: dict[str, Any] = field(default_factory=dict)
    created: str = ""

    @property
    def file(self) -> str:
        """Its one file."""
        return file_name(self.id, self.version)


def file_name(belief_id: str, version: int) -> str:
    """Of the delta of one version, in the store's folder."""
    return f"deltas/{belief_id}-v{version}.safetensors"


@dataclass(frozen=True)
class Manifest:
    """What a store holds.

    Attributes:
        base_digest, tokenizer_digest: roots, hex; no tokenizer has "".
        revision: one more with every change.
        entries: by id.
        encoder: settings that facts are encoded with, None for the defaults.
    """

    base_digest: str
    tokenizer_digest: str
    created: str
    revision: int = 0
    entries: dict[str, Entry] = field(default_factory=dict)
    encoder: dict[str, Any] | None = None

    @functools.cached_property
    def active(self) -> Mapping[str, Entry]:
        """The entries in force, by key, sorted."""
        found = {e.key: e for e in self.entries.values() if e.state == "active"}
        return MappingProxyType({key: found[key] for key in sorted(found)})

    def of_key(self, key: str) -> list[Entry]:
        """All entries of a key, oldest first."""
        return sorted((e for e in self.entries.values() if e.key == key), key=lambda e: e.version)

    def with_entries(self, entries: dict[str, Entry], revision: int) -> Manifest:
        """The same store with other entries."""
        return replace(self, entries=entries, revision=revision)

    def to_bytes(self) -> bytes:
        """JSON."""
        entries = {
            belief_id: {name: value for name, value in vars(entry).items() if name != "id"}
            for belief_id, entry in self.entries.items()
        }
        own = {name: getattr(self, name) for name in _OWN}
        text = strict_json({"format": FORMAT, **own, "entries": entries})
        return (text + "\n").encode()


_OWN = ("base_digest", "tokenizer_digest", "created", "revision", "encoder")


def parse_manifest(data: bytes, where: str) -> Manifest:
    """The inverse of `to_bytes`.

    Raises:
        UnsafeFileError: not a manifest of this format, or one that contradicts itself.
    """
    try:
        content = parsed_json(data)
        if content.pop("format") != FORMAT:
            raise ValueError("of another format or a newer version")
        rows = content.pop("entries")
        entries = {i: _entry(i, row) for i, row in rows.items()}
        manifest = Manifest(**content, entries=entries)
        _check(manifest)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UnsafeFileError(
            f"{where}: expected a manifest of format {FORMAT}, got one that is damaged or was "
            f"edited: {error}"
        ) from error
    return manifest


def _entry(belief_id: str, row: dict[str, Any]) -> Entry:
    entry = Entry(id=belief_id, **{**row, "parents": tuple(row["parents"])})
    texts = (entry.key, entry.state, entry.created, *entry.parents, *entry.files.values())
    if not _ID.fullmatch(belief_id) or not all(isinstance(text, str) for text in texts):
        raise ValueError(f"entry {belief_id!r}")
    if type(entry.version) is not int or entry.version < 1 or entry.state not in STATES:
        raise ValueError(f"version or state of {belief_id}")
    # Every name follows from the id: none can lead out of the folder.
    if set(entry.files) != {entry.file} or not _SHA.fullmatch(entry.files[entry.file]):
        raise ValueError(f"files of {belief_id}: {list(entry.files)!r}")
    if not isinstance(entry.metrics, dict):
        raise ValueError(f"metrics of {belief_id}")
    return entry


def _check(manifest: Manifest) -> None:
    digests = (manifest.base_digest, manifest.tokenizer_digest or "0" * 64)
    if not all(isinstance(x, str) and _SHA.fullmatch(x) for x in digests):
        raise ValueError("base_digest or tokenizer_digest")
    if type(manifest.revision) is not int or manifest.revision < 0:
        raise ValueError(f"revision {manifest.revision!r}")
    if manifest.encoder is not None and not isinstance(manifest.encoder, dict):
        raise ValueError("encoder")
    entries = manifest.entries.values()
    versions = {(entry.key, entry.version) for entry in entries}
    keys = [entry.key for entry in entries if entry.state == "active"]
    if len(versions) < len(manifest.entries) or len(set(keys)) < len(keys):
        raise ValueError("one version twice, or two versions of one key in force")
