"""With a key nobody without it can write a chain that holds."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
from cli.commands import run

from gravity_hf.runtime import Ledger, LedgerError, key_from_environment, verify
from gravity_hf.runtime.chain import GENESIS, chained_line
from gravity_hf.runtime.encoding import strict_json
from gravity_hf.runtime.ledger_file import beside

KEY, OTHER = b"0123456789abcdef" * 2, b"fedcba9876543210" * 2
COUNT = 5
Lines = list[str]


def _written(path: Path, key: bytes | None) -> Path:
    with Ledger("agent", path, fsync=False, key=key) as ledger:
        for i in range(COUNT):
            ledger.log("step", {"i": i})
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return _written(tmp_path / "ledger.jsonl", KEY)


def _rechained(lines: Lines) -> Lines:
    """`lines` with hashes as a writer without the key makes them."""
    last, new = GENESIS, []
    for position, line in enumerate(lines):
        body = {k: v for k, v in json.loads(line).items() if k not in ("previous", "hash")}
        line, last = chained_line(position, last, strict_json(body))
        new.append(line)
    return new


def _edit(lines: Lines) -> Lines:
    return [lines[0].replace('"i": 0', '"i": 9'), *lines[1:]]


ATTACKS: dict[str, Callable[[Lines], Lines]] = {
    "edited": _edit,
    "deleted": lambda x: x[:2] + x[3:],
    "inserted": lambda x: [*x[:3], x[1], *x[3:]],
    "reordered": lambda x: [x[1], x[0], *x[2:]],
    "cut at the end": lambda x: x[:-1],
    "hashed anew": lambda x: _rechained(_edit(x)),
    "appended": lambda x: _appended(x),
    "old lines put before": lambda x: _old(x[:1]) + x,
    "replaced by old lines": lambda x: _old(x),
}


def _appended(lines: Lines) -> Lines:
    """A line at the end, as a process without the key would go on."""
    (body,), last = _old(lines[:1]), json.loads(lines[-1])["hash"]
    return [*lines, chained_line(len(lines), last, body)[0]]


def _old(lines: Lines) -> Lines:
    entries = [json.loads(line) for line in lines]
    return [
        strict_json({k: v for k, v in entry.items() if k not in ("previous", "hash")})
        for entry in entries
    ]


def _head_without_key(path: Path) -> None:
    """What somebody who knows everything but the key can put beside the file."""
    lines = path.read_text().splitlines()
    last = json.loads(lines[-1]).get("hash", GENESIS)
    head = {"count": len(lines), "hash": last, "size": path.stat().st_size}
    beside(path, "head").write_text(strict_json(head) + "\n")


@pytest.mark.parametrize("head", ["kept", "made anew", "signature kept", "removed"])
@pytest.mark.parametrize("attack", ATTACKS)
def test_tampering_without_the_key_is_found(attack: str, head: str, file: Path) -> None:
    assert verify(file, key=KEY).ok
    signature = json.loads(beside(file, "head").read_text())["signature"]
    changed = ATTACKS[attack](file.read_text().splitlines())
    file.write_text("".join(f"{text}\n" for text in changed))
    if head in ("made anew", "signature kept"):
        _head_without_key(file)
    if head == "signature kept":
        content = json.loads(beside(file, "head").read_text())
        beside(file, "head").write_text(strict_json({**content, "signature": signature}) + "\n")
    if head == "removed":
        beside(file, "head").unlink()
    assert not verify(file, key=KEY).ok


@pytest.mark.parametrize("head", ["kept", "made anew", "removed"])
def test_a_keyed_ledger_builds_upon_nothing_forged(head: str, file: Path) -> None:
    lines = _rechained(_edit(file.read_text().splitlines()))
    file.write_text("".join(f"{line}\n" for line in lines))
    if head == "made anew":
        _head_without_key(file)
    if head == "removed":
        beside(file, "head").unlink()
        file.write_text("".join(f"{line}\n" for line in _old(lines)))
    before = file.read_text()
    if head == "kept":
        # Of earlier lines only the end is looked at; what is appended does not make them hold.
        Ledger("agent", file, fsync=False, key=KEY)
        assert not verify(file, key=KEY).ok
    else:
        with pytest.raises(LedgerError, match="key"):
            Ledger("agent", file, fsync=False, key=KEY)
    assert file.read_text() == before


@pytest.mark.parametrize(
    ("written", "read", "reason"),
    [(KEY, OTHER, "with this key"), (KEY, None, "has a key"), (None, KEY, "has no key")],
    ids=["other", "none", "late"],
)
def test_a_chain_holds_under_its_own_key_alone(
    written: bytes | None, read: bytes | None, reason: str, tmp_path: Path
) -> None:
    path = _written(tmp_path / "ledger.jsonl", written)
    report = verify(path, key=read)
    assert not report.ok and reason in str(report)
    with pytest.raises(LedgerError, match=reason):
        Ledger("agent", path, fsync=False, key=read)
    assert verify(path, key=written).ok


def test_a_line_that_was_appended_without_the_key_is_not_taken_in(file: Path) -> None:
    file.write_text("".join(f"{x}\n" for x in _appended(file.read_text().splitlines())))
    with pytest.raises(LedgerError, match=f"line {COUNT + 1} has another hash"):
        Ledger("agent", file, fsync=False, key=KEY)


def test_several_writers_with_one_key_go_on(file: Path) -> None:
    with Ledger("other", file, fsync=False, key=KEY) as ledger:
        ledger.log("more")
        twin = copy.deepcopy(ledger)
    with twin:
        twin.log("twin")
    assert verify(file, key=KEY).lines == COUNT + 2
    assert ledger.verify().ok


def test_a_head_without_a_key_looks_as_before(tmp_path: Path) -> None:
    path = _written(tmp_path / "ledger.jsonl", None)
    assert json.loads(beside(path, "head").read_text()).keys() == {"count", "hash", "size"}
    assert verify(path).ok


def test_the_secret_is_neither_shown_nor_pickled_nor_written(file: Path, tmp_path: Path) -> None:
    ledger = Ledger("agent", file, fsync=False, key=KEY)
    assert KEY.decode() not in repr(vars(ledger)) + str(vars(ledger._file))
    with pytest.raises(TypeError, match="secret"):
        pickle.dumps(ledger)
    assert all(KEY not in path.read_bytes() for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("key", "error", "match"), [(b"short", ValueError, "16 bytes"), ("text", TypeError, "bytes")]
)
def test_a_key_that_is_none_is_refused(
    key: bytes, error: type[Exception], match: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=match):
        Ledger("agent", tmp_path / "l.jsonl", key=key)
    with pytest.raises(ValueError, match="persist_path"):
        Ledger("agent", key=KEY)


def test_the_verb_takes_the_key_from_the_environment(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUDIT_KEY", KEY.decode())
    assert key_from_environment("AUDIT_KEY") == KEY
    assert run("ledger", "verify", file, "--key-env", "AUDIT_KEY").exit_code == 0
    assert run("ledger", "verify", file).exit_code == 1
    monkeypatch.delenv("AUDIT_KEY")
    missing = run("ledger", "verify", file, "--key-env", "AUDIT_KEY")
    assert missing.exit_code == 2 and "AUDIT_KEY" in missing.stderr
