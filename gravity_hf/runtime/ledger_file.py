"""One file that several processes append to, and that a crash cannot spoil.

Beside `<path>` lie `<path>.head` (how many lines there are and the hash of the last: without it
nobody could tell a file that was cut short), `<path>.lock` (held while a process appends) and,
after a crash, `<path>.torn` (the part of a line that was being written).
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from .chain import GENESIS, Head, chained_line, check_line, is_chained, is_entry
from .encoding import parsed_json, strict_json
from .ledger_key import LedgerKey

_logger = logging.getLogger(__name__)
_HASH = re.compile("[0-9a-f]{64}")
_KEYLESS = "the chain has no key, got one: written without it, or by somebody without it"


class LedgerError(RuntimeError):
    """The file on disk is not what this or another ledger left there."""


def beside(path: Path, kind: str) -> Path:
    """`<path>.<kind>`: `head`, `lock` or `torn`."""
    return path.with_name(f"{path.name}.{kind}")


def read_head(path: Path, key: LedgerKey | None = None) -> Head | None:
    """What `<path>.head` says; None where there is none.

    Raises:
        LedgerError: it is not a head, or not one signed with `key`.
    """
    file = beside(path, "head")
    if not file.is_file():
        return None
    try:
        content = parsed_json(file.read_text(encoding="utf-8"))
        signature = content.pop("signature", None)
        head = Head(**content)
        counted = all(type(x) is int and x >= 0 for x in (head.count, head.size))
        whole = counted and bool(_HASH.fullmatch(head.hash))
    except (ValueError, TypeError, AttributeError):
        whole = False
    if not whole:
        raise LedgerError(
            f"{file}: expected count, hash and size as JSON, got something else: edited or "
            "damaged. Nothing is appended; keep both files for whoever looks into it and log to a "
            "new one"
        )
    if fault := _key_fault(head, signature, key):
        raise LedgerError(f"{file}: {fault}. Nothing is appended")
    return head


def _key_fault(head: Head, signature: object, key: LedgerKey | None) -> str | None:
    """What is wrong where the head is not signed with `key`; None where nothing is."""
    if key is None:
        is_signed = signature is not None
        return "the chain has a key: expected that key, got none" if is_signed else None
    if signature is None:
        return _KEYLESS
    if not key.signs(head.signed_text(), signature):
        return "expected it signed with this key: edited, or signed with another"
    return None


class LedgerFile:
    """Appends lines to `path` and keeps its head.

    Args:
        path: the file; made with its folders by the first append.
        fsync: wait until the lines are on the disk, so that a loss of power cannot take them
            either. Without it they survive the end of the process, however it ends.
        key: of the chain; None: it has none.

    Raises:
        ValueError: `path` is a folder.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        fsync: bool = True,
        key: LedgerKey | None = None,
    ) -> None:
        # What a link leads to: the head lies beside the file itself.
        self.path = Path(path).resolve()
        if self.path.is_dir():
            raise ValueError(
                f"Ledger: persist_path: expected a file, got the folder {str(path)!r}. Name a "
                ".jsonl file in it"
            )
        self.fsync = fsync
        self.key = key

    def append(self, bodies: Sequence[str]) -> Head:
        """Append one line for each body, all in one write. The new end of the file.

        Args:
            bodies: JSON objects with the published keys, as text without line breaks.

        Raises:
            LedgerError: the file was cut short, or changed at its end, since it was last appended
                to; its chain has another key, or one where none was given, or none.
            OSError: it could not be written; the file is as it was.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.path):
            head = self._recovered()
            lines, last = [], head.hash
            for position, body in enumerate(bodies, head.count):
                line, last = chained_line(position, last, body, self.key)
                lines.append(line.encode() + b"\n")
            data = b"".join(lines)
            self._write(data, head.size)
            longer = Head(head.count + len(lines), last, head.size + len(data))
            try:
                self._write_head(longer)
            except OSError:
                # Or whoever tries again writes the lines twice.
                os.truncate(self.path, head.size)
                raise
        return longer

    def recover(self) -> Head | None:
        """Set a torn last line aside, where a crash left one; the end of the file. None where there
        is no file yet. Raises as `append`."""
        if not self.path.is_file() and read_head(self.path, self.key) is None:
            return None
        with locked(self.path):
            return self._recovered()

    def _recovered(self) -> Head:
        size = self.path.stat().st_size if self.path.is_file() else 0
        head = read_head(self.path, self.key)
        if head is None:
            head = self._first_head()
            # Before the first line: from here on a missing head is a removed one.
            self._write_head(head)
        elif size < head.size:
            raise LedgerError(
                f"{self.path}: expected {head.size} bytes ({head.count} lines), got {size}: it was "
                "cut short. Nothing is appended; keep it for whoever looks into it and log to a "
                "new file"
            )
        elif size > head.size:
            # Lines that were written when the process ended before it could write the head.
            head = self._caught_up(head)
            self._write_head(head)
        return head

    def _first_head(self) -> Head:
        """Of no file, or of one from before there were chains: its lines count as one block."""
        digest, count, size = hashlib.sha256(), 0, 0
        if self.path.is_file():
            with self.path.open("rb") as file:
                for raw in file:
                    if is_chained(raw):
                        raise LedgerError(
                            f"{self.path}: expected {beside(self.path, 'head').name} beside it, "
                            "got none: nobody can tell whether the ledger was cut short. Bring "
                            "both files, or log to a new one"
                        )
                    if self.key is not None:
                        raise LedgerError(
                            f"{self.path}: {_KEYLESS}: nobody can vouch for its lines. Nothing is "
                            "appended; log to a new file"
                        )
                    if not raw.endswith(b"\n"):
                        self._set_aside(raw, size)
                        break
                    if not is_entry(raw):
                        raise LedgerError(
                            f"{self.path}: line {count + 1}: expected an entry of a ledger, got "
                            f"{raw[:60]!r}. Nothing is appended; log to a new file"
                        )
                    digest.update(raw)
                    count, size = count + 1, size + len(raw)
        return Head(count, digest.hexdigest() if count else GENESIS, size)

    def _caught_up(self, head: Head) -> Head:
        count, last, size = head
        with self.path.open("rb") as file:
            file.seek(size)
            for raw in file:
                if not raw.endswith(b"\n"):
                    self._set_aside(raw, size)
                    break
                last, reason = check_line(raw[:-1], count, last, self.key)
                if reason is not None:
                    raise LedgerError(
                        f"{self.path}: line {count + 1} {reason}. Nothing is appended; keep the "
                        "file for whoever looks into it and log to a new one"
                    )
                count, size = count + 1, size + len(raw)
        return Head(count, last, size)

    def _set_aside(self, torn: bytes, size: int) -> None:
        with beside(self.path, "torn").open("ab") as file:
            file.write(torn + b"\n")
            self._settle(file.fileno())
        os.truncate(self.path, size)
        _logger.warning(
            "%s: the last line was torn (%d bytes); it now lies in %s",
            *(self.path, len(torn), beside(self.path, "torn").name),
        )

    def _write(self, data: bytes, size: int) -> None:
        with self.path.open("ab", buffering=0) as file:
            try:
                rest = memoryview(data)
                while rest:
                    rest = rest[file.write(rest) or 0 :]
                self._settle(file.fileno())
            except OSError:
                file.truncate(size)
                raise

    def _write_head(self, head: Head) -> None:
        target = beside(self.path, "head")
        unfinished = target.with_name(f".{target.name}.tmp")
        # Made anew, never opened: it could be somebody's link to another file.
        unfinished.unlink(missing_ok=True)
        with unfinished.open("x", encoding="utf-8") as file:
            content: dict[str, int | str] = head._asdict()
            if self.key is not None:
                content["signature"] = self.key.sign(head.signed_text())
            file.write(strict_json(content) + "\n")
            file.flush()
            self._settle(file.fileno())
        unfinished.replace(target)
        if self.fsync and os.name == "posix":
            # Without it a loss of power may bring the older head back, which catches up.
            with suppress(OSError):
                _settle_folder(target.parent)

    def _settle(self, descriptor: int) -> None:
        if self.fsync:
            os.fsync(descriptor)


def _settle_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """While no other process appends to `path`."""
    with FileLock(beside(path, "lock")):
        yield
