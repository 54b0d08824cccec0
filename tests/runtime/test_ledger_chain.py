"""Each way to tamper with a ledger's file is found, and named by its line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.commands import run

from gravity_hf.runtime import Ledger, LedgerError, read_ledger, verify
from gravity_hf.runtime.chain import GENESIS, chained_line
from gravity_hf.runtime.encoding import strict_json
from gravity_hf.runtime.ledger_file import beside

COUNT = 6
Lines = list[str]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "ledger.jsonl"
    with Ledger("agent", path, fsync=False) as ledger:
        for i in range(COUNT):
            ledger.log("step", {"i": i, "loss": 0.1 * i})
    return path


def _edited(line: str, **changes: object) -> str:
    return strict_json({**json.loads(line), **changes})


def _unchained(line: str) -> str:
    return strict_json({k: v for k, v in json.loads(line).items() if k not in ("previous", "hash")})


def _rechained(lines: Lines, start: int) -> Lines:
    """`lines` with the hashes from `start` on as an honest writer would have made them."""
    last = json.loads(lines[start - 1])["hash"] if start else GENESIS
    new = lines[:start]
    for position, line in enumerate(lines[start:], start):
        line, last = chained_line(position, last, _unchained(line))
        new.append(line)
    return new


def _edit(lines: Lines) -> Lines:
    return [*lines[:2], _edited(lines[2], payload={"i": 2, "loss": 0.0}), *lines[3:]]


ATTACKS: dict[str, tuple[Callable[[Lines], Lines], int | None, str]] = {
    "edited payload": (_edit, 3, "edited"),
    "edited time": (lambda x: [*x[:2], _edited(x[2], timestamp=0.0), *x[3:]], 3, "edited"),
    "another key": (lambda x: [*x[:2], _edited(x[2], more=1), *x[3:]], 3, "edited"),
    "white space": (lambda x: [*x[:2], x[2].replace(", ", ",", 1), *x[3:]], 3, "edited"),
    "doubled key": (lambda x: [*x[:2], '{"agent_id": "x", ' + x[2][1:], *x[3:]], 3, "edited"),
    "edited last line": (lambda x: [*x[:-1], _edited(x[-1], event="x")], COUNT, "edited"),
    "not JSON": (lambda x: [*x[:2], "gone", *x[3:]], 3, "not JSON"),
    "deleted": (lambda x: x[:2] + x[3:], 3, "does not follow"),
    "deleted first": (lambda x: x[1:], 1, "does not follow"),
    "inserted copy": (lambda x: [*x[:3], x[1], *x[3:]], 4, "does not follow"),
    "inserted unchained": (
        lambda x: [*x[:3], strict_json({"event": "x"}), *x[3:]],
        4,
        "has no hash",
    ),
    "inserted unchained first": (lambda x: [_unchained(x[0]), *x], 2, "does not follow"),
    "inserted text first": (lambda x: ["hello", *x], 1, "not an entry"),
    "nested too deeply": (lambda x: [*x[:2], "[" * 100_000, *x[3:]], 3, "not JSON"),
    "reordered": (lambda x: [*x[:2], x[3], x[2], *x[4:]], 3, "does not follow"),
    "edited and hashed anew": (lambda x: _rechained(_edit(x), 2), COUNT, "another hash"),
    "inserted and hashed anew": (
        lambda x: _rechained([*x[:3], x[1], *x[3:]], 3),
        COUNT,
        "another hash",
    ),
    "deleted and hashed anew": (lambda x: _rechained(x[:2] + x[3:], 2), None, "cut short"),
    "cut at the end": (lambda x: x[:-1], None, "cut short"),
    "emptied": (lambda x: [], None, "cut short"),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_tampering_is_found(attack: str, file: Path) -> None:
    assert verify(file).ok
    change, line, reason = ATTACKS[attack]
    changed = change(file.read_text().splitlines())
    file.write_text("".join(f"{text}\n" for text in changed))
    report = verify(file)
    assert not report.ok
    assert report.line == line
    assert reason in str(report)


def test_a_line_moved_to_another_position_has_another_hash() -> None:
    body = '{"event": "x"}'
    assert chained_line(0, GENESIS, body)[1] != chained_line(1, GENESIS, body)[1]


def test_a_removed_head_is_found_and_nothing_is_appended(file: Path) -> None:
    beside(file, "head").unlink()
    assert "expected ledger.jsonl.head" in str(verify(file))
    with pytest.raises(LedgerError, match="nobody can tell"):
        Ledger(persist_path=file)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"count": 1}',
        '{"count": "6", "hash": 1, "size": 2}',
        f'{{"count": true, "hash": "{GENESIS}", "size": 0}}',
        f'{{"count": 0, "hash": "{GENESIS}", "size": -5}}',
        '{"count": 0, "hash": "none", "size": 0}',
    ],
)
def test_a_damaged_head_is_found(text: str, file: Path) -> None:
    beside(file, "head").write_text(text)
    assert "expected count, hash and size" in str(verify(file))


@pytest.mark.parametrize("kept", [COUNT, COUNT - 1, 0])
def test_a_file_without_its_chain_is_not_said_to_hold(kept: int, file: Path) -> None:
    lines = [_unchained(line) for line in file.read_text().splitlines()[:kept]]
    file.write_text("".join(f"{line}\n" for line in lines))
    beside(file, "head").unlink()
    assert "has no chain: nothing can be checked" in str(verify(file))
    assert run("ledger", "verify", file).exit_code == 1


def test_a_file_that_is_no_ledger_is_not_appended_to(tmp_path: Path) -> None:
    (tmp_path / "any.jsonl").write_text("hello world\n")
    with pytest.raises(LedgerError, match="line 1: expected an entry"):
        Ledger(persist_path=tmp_path / "any.jsonl")


def test_verifying_leaves_no_file(file: Path) -> None:
    beside(file, "lock").unlink(missing_ok=True)
    assert verify(file).ok
    assert not beside(file, "lock").exists()


def test_a_cut_file_is_not_appended_to(file: Path) -> None:
    ledger = Ledger(persist_path=file)
    ledger.log("more")
    before = file.read_text().splitlines(keepends=True)[:-1]
    file.write_text("".join(before))
    with pytest.raises(LedgerError, match="cut short"):
        ledger.flush()
    assert file.read_text() == "".join(before)
    assert len(ledger) == 1


def test_foreign_lines_at_the_end_are_not_built_upon(file: Path) -> None:
    with file.open("a") as text:
        text.write('{"event": "x"}\n')
    with pytest.raises(LedgerError, match="line 7 has no hash"):
        Ledger(persist_path=file)
    assert verify(file).line == 7


def test_only_an_anchor_kept_elsewhere_shows_a_rewritten_file(file: Path, tmp_path: Path) -> None:
    noted = Ledger(persist_path=file).head
    forged = tmp_path / "forged" / "ledger.jsonl"
    with Ledger("agent", forged, fsync=False) as ledger:
        for i in range(COUNT):
            ledger.log("step", {"i": i, "loss": 0.0})
    for kind in ("", ".head"):
        shutil.copy(f"{forged}{kind}", f"{file}{kind}")
    assert verify(file).ok
    report = verify(file, anchor=(noted.count, noted.hash))
    assert report.line == COUNT and "the anchor" in str(report)


def test_an_anchor_holds_for_a_file_that_has_grown(file: Path) -> None:
    noted = Ledger(persist_path=file).head
    with Ledger(persist_path=file, fsync=False) as ledger:
        ledger.log("more")
    assert verify(file, anchor=noted[:2]).ok


def test_a_published_file_is_read_and_sealed(tmp_path: Path) -> None:
    file = tmp_path / "old.jsonl"
    keys = {"entry_id": "1", "timestamp": 1.5, "agent_id": "a", "event": "e"}
    old = [json.dumps({**keys, "payload": {"loss": x}}) for x in (1.0, float("nan"))]
    file.write_text("".join(f"{line}\n" for line in old))
    assert verify(file).unchained == 2 and not verify(file).ok
    with Ledger(persist_path=file, fsync=False) as ledger:
        ledger.log("new")
    report = verify(file)
    assert report.ok and (report.lines, report.unchained) == (3, 2)
    assert [e.event for e in read_ledger(file)] == ["e", "e", "new"]
    file.write_text(file.read_text().replace('"loss": 1.0', '"loss": 2.0'))
    assert not verify(file).ok


def test_the_verb_says_what_holds_and_what_does_not(file: Path) -> None:
    shown = run("ledger", "verify", file)
    assert shown.exit_code == 0
    assert f"{COUNT} lines: the chain holds" in shown.output
    anchor = shown.output.split("anchor:")[1].strip()
    assert run("ledger", "verify", file, "--anchor", anchor).exit_code == 0
    wrong = run("ledger", "verify", file, "--anchor", "3")
    assert wrong.exit_code == 2 and "COUNT:HASH" in wrong.stderr
    file.write_text(file.read_text().replace("agent", "spy", 1))
    broken = run("ledger", "verify", file)
    assert broken.exit_code == 1
    assert "line 1 " in broken.output
    assert run("ledger", "verify", "no_such_file").exit_code == 2
    assert "gravity-hf ledger verify" in run("ledger", "verify", "--help").output
