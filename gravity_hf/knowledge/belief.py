"""One version of one fact in a store."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from .delta import LowRankDelta
from .errors import IntegrityError, UnknownKeyError
from .facts import Fact
from .manifest import Entry
from .store_files import LARGEST_DELTA, confined, parse_delta, read_bytes, sha256


class Belief:
    """What a store knows by a key: a snapshot, which later changes of the store leave as it is.

    The file is read at the first use of `fact`, `delta`, `metadata` or `report`, compared with its
    digest, and kept.

    Attributes:
        id: of this version alone, 32 hex digits.
        key, version: the user's name for it, and 1, 2, ...

    Raises:
        IntegrityError: from the four, where the file is gone or not as it was written.
        UnknownKeyError: from the four, where it was purged.
    """

    def __init__(self, root: Path, entry: Entry, data: bytes | None = None) -> None:
        self._root = root
        self._entry = entry
        self._data = data  # of one that is not written yet
        self._content: tuple[LowRankDelta, dict[str, Any]] | None = None
        self._reading = threading.Lock()

    @property
    def id(self) -> str:
        return self._entry.id

    @property
    def key(self) -> str:
        return self._entry.key

    @property
    def version(self) -> int:
        return self._entry.version

    @property
    def metrics(self) -> dict[str, Any]:
        """The numbers of the report; no file is read."""
        return dict(self._entry.metrics)

    @property
    def delta(self) -> LowRankDelta:
        """On the CPU. Shared: copy before changing its tensors."""
        return self._read()[0]

    @property
    def fact(self) -> Fact | None:
        """What it was learned from; None where it came as a delta alone."""
        values = self._read()[1]["fact"]
        return None if values is None else Fact.from_row(values, where=self._entry.file)

    @property
    def metadata(self) -> dict[str, Any]:
        """What was given with it."""
        return dict(self._read()[1]["metadata"] or {})

    @property
    def report(self) -> dict[str, Any]:
        """What the encoder measured."""
        return dict(self._read()[1]["report"] or {})

    def __repr__(self) -> str:
        return f"Belief({self.key!r}, version={self.version}, id={self.id!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Belief) and self.id == other.id

    def __hash__(self) -> int:
        return hash(self.id)

    def _read(self) -> tuple[LowRankDelta, dict[str, Any]]:
        with self._reading:
            if self._content is None:
                data = self._data or checked_bytes(self._root, self._entry)
                self._content = parse_delta(data, self._entry.file)
                self._data = None
            return self._content


def checked_bytes(root: Path, entry: Entry) -> bytes:
    """The entry's file, compared with its digest.

    Raises:
        IntegrityError: gone or changed.
        UnknownKeyError: purged.
        UnsafeFileError: no regular file, or larger than any delta.
    """
    if entry.state == "purged":
        raise UnknownKeyError(
            f"{entry.key}: version {entry.version} was purged: its file is deleted"
        )
    name = entry.file
    try:
        data = read_bytes(confined(root, name), LARGEST_DELTA)
    except FileNotFoundError as error:
        raise IntegrityError(
            f"{name}: expected the delta of {entry.key!r} in {str(root)!r}, got no file. Bring it "
            "back from a copy, or purge the key",
            [name],
        ) from error
    if sha256(data) != entry.files[name]:
        raise IntegrityError(
            f"{name}: expected the bytes that were written for {entry.key!r}, got others. Bring "
            "the file back from a copy, or purge the key",
            [name],
        )
    return data
