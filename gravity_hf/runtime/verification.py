"""Whether a ledger's file is what was logged."""

from __future__ import annotations

import hashlib
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from .chain import GENESIS, Head, check_line, is_chained, is_entry
from .ledger_file import LedgerError, beside, locked, read_head
from .ledger_key import LedgerKey


@dataclass(frozen=True)
class LedgerReport:
    """What `verify` found.

    Attributes:
        path: the file.
        lines: complete lines that were read; up to the first that breaks the chain.
        unchained: how many of them, at the beginning, are from before there was a chain. They are
            covered as one block: the first chained line holds their hash.
        hash: of the last line that holds.
        line: 1-based, where the chain breaks; None where it does not, or where the file as a whole
            is at fault.
        reason: what is wrong, in words; None: nothing is.
    """

    path: Path
    lines: int
    unchained: int
    hash: str
    line: int | None = None
    reason: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the whole file holds."""
        return self.reason is None

    def __str__(self) -> str:
        if self.reason is None:
            old = f", the first {self.unchained} without a chain" if self.unchained else ""
            return f"{self.path}: {self.lines} lines{old}: the chain holds, its end {self.hash}"
        where = "" if self.line is None else f"line {self.line} "
        return f"{self.path}: {where}{self.reason}"


def verify(
    path: str | os.PathLike[str],
    *,
    anchor: tuple[int, str] | None = None,
    key: bytes | LedgerKey | None = None,
) -> LedgerReport:
    """Read a ledger's file from the beginning and check every line. Changes nothing.

    Found are lines that were edited, removed, inserted, moved or cut off, and a torn last line.
    Without a key, not found is what somebody did who rewrote the file and its `.head` together:
    only a head that was noted elsewhere (`anchor`) shows that. With one nobody can who has not got
    the key; what remains is to bring back both files as they once were, which the anchor shows. A
    file without any chain cannot be checked, and is not `ok`: its next append seals it. Lines added
    at the end in the right form are what every process that logs adds; they are no fault. A line
    that is being written while the file's `.lock` cannot be opened (of another user, say) looks
    torn: ask again.

    Args:
        anchor: `(count, hash)` of `Ledger.head` at some time, kept where nobody could change it.
        key: that of the ledger. A chain without one does not hold under a key, and one with a key
            not without it.

    Raises:
        FileNotFoundError: there is no such file.
        TypeError, ValueError: `key` is none.
    """
    path, key = Path(path).resolve(), LedgerKey.of(key)
    if not path.is_file():
        raise FileNotFoundError(f"verify: expected the file of a ledger, got {str(path)!r}")
    with ExitStack() as stack:
        # Whoever appended has made the lock. It may be another user's, or on a disk to read only.
        if os.access(beside(path, "lock"), os.W_OK):
            stack.enter_context(locked(path))
        try:
            head = read_head(path, key)
        except LedgerError as error:
            return LedgerReport(path, 0, 0, GENESIS, reason=str(error))
        return _Reading(path, head, anchor, key).report()


class _Reading:
    """One pass over the file."""

    def __init__(
        self,
        path: Path,
        head: Head | None,
        anchor: tuple[int, str] | None,
        key: LedgerKey | None,
    ) -> None:
        self.path, self.key = path, key
        self.anchors = [("its .head", head.count, head.hash)] if head is not None else []
        if anchor is not None:
            self.anchors.append(("the anchor", *anchor))
        self.has_head = head is not None
        self.lines, self.unchained, self.hash = 0, 0, GENESIS

    def report(self) -> LedgerReport:
        prefix = hashlib.sha256()
        with self.path.open("rb") as file:
            for raw in file:
                if not raw.endswith(b"\n"):
                    return self._broken("is torn: a crash while it was written, or a cut")
                # With a key nothing is vouched for that was not written with it.
                is_old = self.key is None and self.lines == self.unchained
                if is_old and not is_chained(raw):
                    if not is_entry(raw):
                        return self._broken("is not an entry of a ledger")
                    prefix.update(raw)
                    self.unchained, self.hash = self.unchained + 1, prefix.hexdigest()
                else:
                    self.hash, reason = check_line(raw[:-1], self.lines, self.hash, self.key)
                    if reason is not None:
                        return self._broken(reason)
                self.lines += 1
                for name, count, expected in self.anchors:
                    # Old lines are anchored as a block, at its end.
                    if count == self.lines and expected != self.hash:
                        return self._broken(f"has another hash than {name} says", self.lines)
        return self._whole()

    def _whole(self) -> LedgerReport:
        for name, count, _ in self.anchors:
            if count > self.lines:
                return self._broken(
                    f"expected {count} lines by {name}, got {self.lines}: cut short", whole=True
                )
        if self.key is None and not self.has_head and self.lines == self.unchained:
            return self._broken("has no chain: nothing can be checked", whole=True)
        if not self.has_head:
            reason = f"expected {beside(self.path, 'head').name} beside it, got none: lines may be"
            return self._broken(f"{reason} missing at the end", whole=True)
        return LedgerReport(self.path, self.lines, self.unchained, self.hash)

    def _broken(self, reason: str, line: int | None = None, whole: bool = False) -> LedgerReport:
        at = None if whole else line or self.lines + 1
        return LedgerReport(self.path, self.lines, self.unchained, self.hash, at, reason)
