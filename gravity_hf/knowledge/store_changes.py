"""Changes of a store, all of them or none: gathered in memory, made real by one renaming."""

from __future__ import annotations

import itertools
import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .errors import KnowledgeError, UnsafeFileError
from .manifest import Entry, Manifest, parse_manifest
from .store_files import LARGEST_JSON, confined, read_bytes, settle_folder, write_bytes
from .store_lock import StoreLock

MANIFEST_FILE = "manifest.json"
_STAGED = itertools.count(1)
_logger = logging.getLogger(__name__)


class Changes:
    """The manifest of a folder, as it is on disk and as an open transaction would leave it.

    A crash leaves the older state or the newer one. What it may leave besides is a file that no
    manifest names, or a temporary one; nothing reads those, and nothing deletes them.
    """

    def __init__(self, root: Path, lock: StoreLock) -> None:
        self.root = root
        self._lock = lock
        self._owner: int | None = None  # the thread whose transaction is open
        self._staged: Manifest | None = None
        self._files: dict[str, bytes] = {}
        self._current = read_manifest(root)

    @property
    def manifest(self) -> Manifest:
        """What this thread is to see: its open transaction, or what was last read."""
        staged = self._staged
        is_own = staged is not None and self._owner == threading.get_ident()
        return staged if is_own and staged is not None else self._current

    def data(self, entry: Entry) -> bytes | None:
        """The bytes of an entry that is not written yet."""
        return self._files.get(entry.file) if self._owner == threading.get_ident() else None

    def reload(self) -> None:
        """See what other processes wrote since.

        Raises:
            KnowledgeError: in a transaction, which sees it from its start.
        """
        if self._owner == threading.get_ident():
            raise KnowledgeError(
                "reload: expected no open transaction, got one: it began with what was there"
            )
        self._current = read_manifest(self.root)

    def stage(
        self, entries: dict[str, Entry], entry: Entry | None = None, data: bytes = b""
    ) -> None:
        """Within a transaction: these entries from now on, and `data` for the file of `entry`."""
        # Of its own, below 0: a reader that keeps what it read by revision must not take this for
        # what is written later.
        self._staged = self.manifest.with_entries(entries, -next(_STAGED))
        if entry is not None:
            self._files[entry.file] = data

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """While nobody else writes; what is staged is written at the end, and nothing of it where
        an exception leaves the block. Inside another transaction it is a part of that.

        Raises:
            LockTimeoutError: another process writes for too long.
        """
        if self._owner == threading.get_ident():
            with self._savepoint():
                yield
            return
        with self._lock.held():
            before = self._current = read_manifest(self.root)
            self._owner, self._staged, self._files = threading.get_ident(), before, {}
            try:
                yield
                if self._staged is not before:
                    self._commit(before)
            finally:
                self._owner, self._staged, self._files = None, None, {}

    @contextmanager
    def _savepoint(self) -> Iterator[None]:
        staged, files = self._staged, dict(self._files)
        try:
            yield
        except BaseException:
            # Whoever catches this goes on without any of what was staged here.
            self._staged, self._files = staged, files
            raise

    def _commit(self, before: Manifest) -> None:
        staged = self.manifest
        # However many changes: one revision.
        final = before.with_entries(staged.entries, before.revision + 1)
        try:
            self._write_files()
            write_bytes(confined(self.root, MANIFEST_FILE), final.to_bytes())
        except BaseException:
            self._give_up()
            raise
        self._current = final
        self._delete_purged()

    def _write_files(self) -> None:
        paths = {confined(self.root, name): data for name, data in self._files.items()}
        for path, data in paths.items():
            path.parent.mkdir(exist_ok=True)
            write_bytes(path, data, settle=False)
        for folder in {path.parent for path in paths}:
            settle_folder(folder)

    def _give_up(self) -> None:
        """Delete the files of this transaction, unless its manifest came to be after all."""
        self._current = read_manifest(self.root)
        kept = {entry.file for entry in self._current.entries.values()}
        for name in set(self._files) - kept:
            with suppress(OSError, UnsafeFileError):
                confined(self.root, name).unlink(missing_ok=True)

    def _delete_purged(self) -> None:
        """Also those of a process that ended before it came to it."""
        for entry in self._current.entries.values():
            if entry.state == "purged":
                try:
                    confined(self.root, entry.file).unlink(missing_ok=True)
                except (OSError, UnsafeFileError) as error:
                    _logger.warning("%s: purged, but not deleted: %s", entry.file, error)


def read_manifest(root: Path) -> Manifest:
    """The manifest in a folder.

    Raises:
        UnsafeFileError: it is damaged, or no store.
    """
    path = confined(root, MANIFEST_FILE)
    try:
        return parse_manifest(read_bytes(path, LARGEST_JSON), str(path))
    except FileNotFoundError as error:
        raise UnsafeFileError(
            f"{root}: expected the folder of a store, got one without {MANIFEST_FILE}. Make one "
            "with BeliefStore.create"
        ) from error
