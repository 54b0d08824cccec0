"""One writer of a store at a time, among the threads and processes of a machine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import BaseFileLock, FileLock, Timeout

from .errors import LockTimeoutError

LOCK_FILE = ".lock"


class StoreLock:
    """Held while a store is changed; a thread that holds it may take it again.

    The system frees the lock of a process that ends, however it ends; the file stays.

    Args:
        folder: of the store.
        timeout: seconds to wait for another writer.
    """

    name = LOCK_FILE

    def __init__(self, folder: Path, timeout: float) -> None:
        self._path = folder / LOCK_FILE
        self._timeout = timeout
        self._lock, self._process = self._new(), os.getpid()

    def _new(self) -> BaseFileLock:
        # Each thread has its own hold: threads wait for each other as processes do.
        return FileLock(self._path, thread_local=True)

    @contextmanager
    def held(self) -> Iterator[None]:
        """While nobody else can write.

        Raises:
            LockTimeoutError: another writer did not finish in time; nothing was changed.
        """
        if self._process != os.getpid():
            # A forked process has no part in its parent's lock.
            self._lock, self._process = self._new(), os.getpid()
        lock = self._lock
        try:
            lock.acquire(timeout=self._timeout)
        except Timeout as error:
            raise LockTimeoutError(
                f"{self._path}: expected to write within {self._timeout:g} s, another "
                "thread or process still holds the store. Try again, or open the store with a "
                "larger lock_timeout"
            ) from error
        try:
            yield
        finally:
            lock.release()
