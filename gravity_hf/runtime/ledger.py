"""An append-only log of what an agent did: in memory, and in a chained JSONL file."""

from __future__ import annotations

import copy
import os
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .chain import PUBLISHED_KEYS, Head
from .encoding import json_value, parsed_json, strict_json
from .ledger_file import LedgerFile
from .ledger_key import LedgerKey
from .verification import LedgerReport, verify


@dataclass(frozen=True)
class LedgerEntry:
    """One event.

    Attributes:
        entry_id: a random UUID as text.
        timestamp: seconds since 1970.
        agent_id: who logged it.
        event: what happened, such as `inference`.
        payload: the details, JSON-able.
    """

    entry_id: str = field(default_factory=lambda: str(uuid.uuid4()))
    timestamp: float = field(default_factory=time.time)
    agent_id: str = ""
    event: str = ""
    payload: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The fields in their order; a deep copy."""
        return {name: copy.deepcopy(getattr(self, name)) for name in PUBLISHED_KEYS}

    def to_json(self) -> str:
        """One line of strict JSON, the keys in the order of the fields."""
        return strict_json(json_value(self.to_dict(), "entry"))


class Ledger:
    """Events in the order in which they were logged.

    Entries wait in memory until `flush` appends them to the file; with `write_through` each is
    appended at once. In the file every line carries the hash of the one before it: `verify` finds
    lines that were edited, removed, inserted, moved or cut off. Somebody who rewrites the file
    *and* its `.head` leaves no trace in them, unless the chain has a `key`; note `head` elsewhere
    where that matters.

    Several processes may log to one file. A copy (`copy.deepcopy`, pickle, a forked process)
    writes only what it logs itself.

    Args:
        agent_id: who logs.
        persist_path: a `.jsonl` file, made with its folders when first written. None: memory only.
        max_memory_entries: with a file, that many entries are flushed together; without one, or
            with `write_through`, the oldest make room for new ones. While the file cannot be
            written (a full disk), `entries` forgets the oldest too, but what waits for the file is
            kept, however much it is.
        write_through: write each entry as it is logged.
        fsync: see `LedgerFile`.
        key: a secret of 16 bytes or more, for a chain that nobody else can write;
            `runtime.key_from_environment` reads one. A file has it from its first line or never.

    Raises:
        LedgerError: the file was cut short, or changed at its end, since it was last appended to;
            earlier lines are read by `verify` alone. Its chain has another key, or none.
        TypeError: a key that is not bytes.
        ValueError: settings that cannot be honoured; `persist_path` is a folder.

    Example:
        >>> ledger = Ledger("agent")
        >>> ledger.log("train_step", {"step": 1, "loss": float("nan")}).payload
        {'step': 1, 'loss': 'NaN'}
    """

    def __init__(
        self,
        agent_id: str = "default",
        persist_path: str | os.PathLike[str] | None = None,
        max_memory_entries: int = 1000,
        *,
        write_through: bool = False,
        fsync: bool = True,
        key: bytes | LedgerKey | None = None,
    ) -> None:
        if max_memory_entries < 1:
            raise ValueError(
                f"Ledger: max_memory_entries: expected at least 1, got {max_memory_entries!r}. "
                "Pass write_through=True to write each entry at once"
            )
        if write_through and persist_path is None:
            raise ValueError("Ledger: write_through needs a file: pass persist_path, got None")
        if key is not None and persist_path is None:
            raise ValueError("Ledger: key needs a file: pass persist_path, got None")
        self.agent_id = agent_id
        self.persist_path = None if persist_path is None else Path(persist_path)
        self.max_memory_entries = max_memory_entries
        self.write_through = write_through
        self._key = LedgerKey.of(key)
        self._file = (
            None if persist_path is None else LedgerFile(persist_path, fsync=fsync, key=self._key)
        )
        self._entries: deque[LedgerEntry] = deque(maxlen=max_memory_entries)
        # The JSON of what is not in the file yet, made when it was logged.
        self._pending: list[str] = []
        self._lock = threading.RLock()
        self._process = os.getpid()
        self.head: Head | None = None if self._file is None else self._file.recover()

    def log(self, event: str, payload: dict[str, Any] | None = None) -> LedgerEntry:
        """Note an event. The entry has a copy of `payload` as JSON knows it (see `json_value`).

        Raises:
            TypeError, ValueError: `payload` is no mapping or has no JSON form; nothing is logged.
            LedgerError, OSError: the file could not be appended to; the entry stays in memory.
        """
        payload = json_value({} if payload is None else payload)
        if not isinstance(payload, dict):
            raise TypeError(
                f"Ledger.log: payload: expected a mapping, got {payload!r:.60}. Give it a name: "
                "{'value': ...}"
            )
        entry = LedgerEntry(agent_id=self.agent_id, event=str(event), payload=payload)
        # Now: whoever gets the entry may change its payload before it is written.
        body = None if self._file is None else strict_json(vars(entry))
        with self._lock:
            self._leave_to_parent()
            self._entries.append(entry)
            if body is not None:
                self._pending.append(body)
                if self.write_through:
                    self._write()
                elif len(self._entries) >= self.max_memory_entries:
                    self.flush()
        return entry

    def flush(self) -> int:
        """Append what waits to the file and clear the memory; how many lines were written.

        Without a file, or with nothing to write, nothing changes.
        """
        with self._lock:
            self._leave_to_parent()
            if self._file is None or not self._pending:
                return 0
            written = self._write()
            self._entries.clear()
            return written

    def entries(self, event_filter: str | None = None) -> list[LedgerEntry]:
        """The entries in memory, oldest first; of one event, or of all."""
        return [e for e in list(self._entries) if event_filter in (None, e.event)]

    def snapshot(self) -> dict[str, Any]:
        """`agent_id`, `entry_count` and `entries` in memory, as plain copies."""
        entries = [entry.to_dict() for entry in list(self._entries)]
        return {"agent_id": self.agent_id, "entry_count": len(entries), "entries": entries}

    def restore(self, snapshot: dict[str, Any]) -> int:
        """Put the entries of a `snapshot` before those in memory, as history: they are not written
        to the file, where their own ledger has them. How many were taken.

        Raises:
            ValueError: it is no snapshot; nothing is changed.
        """
        past = entries_of(snapshot)
        with self._lock:
            known = {entry.entry_id for entry in self._entries}
            past = [entry for entry in past if entry.entry_id not in known]
            room = max(self.max_memory_entries - len(self._entries) - 1, 0)
            past = past[len(past) - min(room, len(past)) :]
            self._entries.extendleft(reversed(past))
        return len(past)

    def verify(self) -> LedgerReport:
        """`verify` of the file.

        Raises:
            ValueError: there is none.
        """
        if self._file is None:
            raise ValueError("Ledger.verify: expected a ledger with persist_path, got none")
        return verify(self._file.path, key=self._key)

    def __len__(self) -> int:
        return len(self._entries)

    def __bool__(self) -> bool:
        """True: an empty ledger is a ledger too."""
        return True

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *error: object) -> None:
        self.flush()

    def __getstate__(self) -> dict[str, Any]:
        state = {name: value for name, value in self.__dict__.items() if name != "_lock"}
        return {**state, "_pending": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()
        self._process = os.getpid()

    def _write(self) -> int:
        written = len(self._pending)
        if self._file is not None and written:
            self.head = self._file.append(self._pending)
            self._pending = []
        return written

    def _leave_to_parent(self) -> None:
        """After a fork: what the parent logged, the parent writes."""
        if os.getpid() != self._process:
            self._process, self._pending = os.getpid(), []


def entries_of(snapshot: Any) -> list[LedgerEntry]:
    """The entries of a `Ledger.snapshot()`.

    Raises:
        ValueError: it is none.
    """
    try:
        past = [
            LedgerEntry(**{key: json_value(entry[key]) for key in PUBLISHED_KEYS})
            for entry in snapshot["entries"]
        ]
        fits = all(_fits(entry) for entry in past)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(_no_snapshot(snapshot)) from error
    if not fits:
        raise ValueError(_no_snapshot(snapshot))
    return past


def _fits(entry: LedgerEntry) -> bool:
    texts = (entry.entry_id, entry.agent_id, entry.event)
    return (
        all(isinstance(text, str) for text in texts)
        and isinstance(entry.timestamp, int | float)
        and isinstance(entry.payload, dict)
    )


def _no_snapshot(got: Any) -> str:
    return f"Ledger.restore: expected what Ledger.snapshot() gives, got {got!r:.80}"


def read_ledger(path: str | os.PathLike[str]) -> Iterator[LedgerEntry]:
    """The entries of a ledger's file, chained or from before there were chains, oldest first. A
    torn last line is left out; `verify` says whether the rest can be trusted.

    Raises:
        ValueError: a line is not an entry.
    """
    with Path(path).open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.endswith(b"\n"):
                return
            try:
                record = parsed_json(raw)
                yield LedgerEntry(**{key: record[key] for key in PUBLISHED_KEYS})
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path}: line {number}: expected a ledger entry, got {raw[:60]!r}"
                ) from error
