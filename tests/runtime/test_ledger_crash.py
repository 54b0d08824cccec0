"""A ledger's file survives processes that end at any moment, and several at once."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from gravity_hf.runtime import Ledger, LedgerEntry, read_ledger, verify
from gravity_hf.runtime.ledger_file import LedgerFile, beside

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
KILLS = 12


def _log_until_killed(path: Path, fsync: bool, done: Connection) -> None:
    ledger = Ledger("child", path, write_through=True, fsync=fsync, max_memory_entries=1)
    # Long lines take long to write: some kills fall into them.
    filler = "x" * 20_000
    i = 0
    while True:
        ledger.log("step", {"i": i, "filler": filler})
        done.send(i)
        i += 1


@needs_fork
@pytest.mark.parametrize("fsync", [True, False])
def test_sigkill_loses_no_line_that_was_written(fsync: bool, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    context, chance = multiprocessing.get_context("fork"), random.Random(0)
    logged = 0
    for _ in range(KILLS):
        mine, theirs = context.Pipe(duplex=False)
        child = context.Process(target=_log_until_killed, args=(path, fsync, theirs))
        child.start()
        theirs.close()
        mine.recv()
        time.sleep(chance.uniform(0.0, 0.02))
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        acknowledged = 1
        while mine.poll():
            try:
                mine.recv()
            except EOFError:
                break
            acknowledged += 1
        Ledger(persist_path=path)  # recovers
        report = verify(path)
        assert report.ok, report
        # The one that was being written may have made it, unacknowledged.
        assert report.lines - logged - acknowledged in (0, 1)
        logged = report.lines
    assert len(list(read_ledger(path))) == logged


def _log_some(path: Path, agent: str, count: int) -> None:
    ledger = Ledger(agent, path, write_through=True, fsync=False)
    for i in range(count):
        ledger.log("step", {"i": i})


@needs_fork
def test_processes_append_to_one_file(tmp_path: Path) -> None:
    path, count = tmp_path / "ledger.jsonl", 40
    context = multiprocessing.get_context("fork")
    agents = ("a", "b", "c")
    children = [context.Process(target=_log_some, args=(path, x, count)) for x in agents]
    for child in children:
        child.start()
    for child in children:
        child.join()
        assert child.exitcode == 0
    report = verify(path)
    assert report.ok and report.lines == 3 * count
    entries = list(read_ledger(path))
    for agent in agents:
        assert [e.payload["i"] for e in entries if e.agent_id == agent] == list(range(count))


@needs_fork
def test_a_forked_process_leaves_its_parents_lines_to_the_parent(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    ledger = Ledger("parent", path, fsync=False)
    ledger.log("parent")
    child = multiprocessing.get_context("fork").Process(target=ledger.flush)
    child.start()
    child.join()
    ledger.flush()
    assert [e.event for e in read_ledger(path)] == ["parent"]


def _ledger_of(path: Path, count: int) -> None:
    with Ledger("agent", path, fsync=False) as ledger:
        for i in range(count):
            ledger.log("step", {"i": i})


@pytest.mark.parametrize("torn", [b'{"entry_id": "1', b"\x00\xff", b'{"event": "whole"}'])
def test_a_torn_last_line_is_set_aside(torn: bytes, tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    _ledger_of(path, 2)
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    report = verify(path)
    assert report.line == 3 and "torn" in str(report)
    assert len(list(read_ledger(path))) == 2
    ledger = Ledger("agent", path, fsync=False)
    assert path.read_bytes() == whole
    assert beside(path, "torn").read_bytes() == torn + b"\n"
    ledger.log("more")
    ledger.flush()
    assert verify(path).lines == 3 and verify(path).ok


def test_a_torn_line_of_a_published_file_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "old.jsonl"
    whole = LedgerEntry(event="x").to_json().encode() + b"\n"
    path.write_bytes(whole + b'{"ev')
    Ledger(persist_path=path)
    assert path.read_bytes() == whole
    assert beside(path, "torn").read_bytes() == b'{"ev\n'


def test_lines_beyond_the_head_are_taken_in(tmp_path: Path) -> None:
    """As after a crash between the line and the head."""
    path = tmp_path / "ledger.jsonl"
    _ledger_of(path, 2)
    head = beside(path, "head").read_bytes()
    _ledger_of(path, 1)
    beside(path, "head").write_bytes(head)
    assert verify(path).ok
    assert Ledger(persist_path=path).head.count == 3
    assert verify(path).ok


def test_a_write_that_fails_leaves_the_file_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "ledger.jsonl"
    _ledger_of(path, 2)
    whole = path.read_bytes()
    ledger = Ledger("agent", path)
    ledger.log("more")

    def full(self: LedgerFile, descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(LedgerFile, "_settle", full)
        with pytest.raises(OSError, match="No space"):
            ledger.flush()
    assert path.read_bytes() == whole
    assert len(ledger) == 1
    assert ledger.flush() == 1
    assert verify(path).lines == 3 and verify(path).ok


def test_a_head_that_cannot_be_written_does_not_double_the_lines(tmp_path: Path) -> None:
    path = tmp_path / "ledger.jsonl"
    _ledger_of(path, 2)
    ledger = Ledger("agent", path, fsync=False)
    ledger.log("more")
    unfinished = tmp_path / ".ledger.jsonl.head.tmp"
    unfinished.mkdir()
    with pytest.raises(OSError):
        ledger.flush()
    unfinished.rmdir()
    ledger.flush()
    assert [e.event for e in read_ledger(path)] == ["step", "step", "more"]
    assert verify(path).ok


def test_a_link_in_the_heads_place_is_not_written_through(tmp_path: Path) -> None:
    mine = tmp_path / "mine.txt"
    mine.write_text("mine")
    (tmp_path / ".ledger.jsonl.head.tmp").symlink_to(mine)
    _ledger_of(tmp_path / "ledger.jsonl", 1)
    assert mine.read_text() == "mine"
    assert verify(tmp_path / "ledger.jsonl").ok


def test_a_linked_file_is_one_ledger_under_both_names(tmp_path: Path) -> None:
    _ledger_of(tmp_path / "ledger.jsonl", 1)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "ledger.jsonl")
    _ledger_of(tmp_path / "link.jsonl", 1)
    for name in ("ledger.jsonl", "link.jsonl"):
        assert verify(tmp_path / name).lines == 2 and verify(tmp_path / name).ok
