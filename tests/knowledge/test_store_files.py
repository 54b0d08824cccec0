"""Files that are refused before anything in them is used."""

from __future__ import annotations

import json
import os
import pickle
import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from gravity_hf.knowledge.errors import IntegrityError, KnowledgeError, UnsafeFileError
from gravity_hf.knowledge.manifest import Entry, Manifest, file_name, parse_manifest
from gravity_hf.knowledge.residual_delta import ResidualDelta
from gravity_hf.knowledge.store import BeliefStore
from gravity_hf.knowledge.store_files import (
    confined,
    delta_bytes,
    parse_delta,
    read_bytes,
    write_bytes,
)

HEAD = {
    "format": "gravity-delta/1",
    "kind": "low_rank",
    **dict.fromkeys(("fact", "metadata", "report"), "null"),
}
ID = "0123456789abcdef" * 2


def factors(dtype=torch.float32, value=0.5):
    return {
        "m.lora_A": torch.full((1, 4), value, dtype=dtype),
        "m.lora_B": torch.full((3, 1), value, dtype=dtype),
    }


def test_a_delta_file_gives_back_its_content(llama, random_delta):
    delta = random_delta(llama, 1)
    content = {"fact": None, "metadata": {"a": [1, "é"]}, "report": {"kl": 0.25}}
    again, read = parse_delta(delta_bytes(delta, content), "file")
    assert read == content and type(again) is type(delta)
    assert all(torch.equal(again.to_tensors()[n], x) for n, x in delta.to_tensors().items())
    blocks = ResidualDelta({"model.layers.0": (torch.ones(1, 32), torch.ones(32, 1))})
    assert type(parse_delta(delta_bytes(blocks, content), "file")[0]) is ResidualDelta


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "safetensors"),
        (pickle.dumps({"a": 1}), "safetensors"),
        (struct.pack("<Q", 2**60) + b"{}", "safetensors"),
        (struct.pack("<Q", 6) + b"[[[[[[", "safetensors"),
        (save(factors()), "gravity-delta/1"),
        (save(factors(), {**HEAD, "format": "gravity-delta/2"}), "gravity-delta/1"),
        (save(factors(), {**HEAD, "kind": "merged"}), "'merged'"),
        (save(factors(), {**HEAD, "report": "{"}), "safetensors"),
        (save(factors(), HEAD)[:-1], "safetensors"),
        (save(factors() | {"bias": torch.ones(3)}, HEAD), "bias"),
        (save({"m.lora_A": torch.ones(1, 4)}, HEAD), "missing"),
        (save(factors(torch.int32, 1), HEAD), "int32"),
        (save(factors(value=float("nan")), HEAD), "finite"),
        (save(factors(value=float("-inf")), HEAD), "finite"),
    ],
    ids=[
        *("empty", "pickle", "huge header", "no JSON", "no metadata", "newer", "kind", "report"),
        *("cut", "foreign tensor", "one factor", "integers", "NaN", "infinity"),
    ],
)
def test_what_is_no_delta_is_refused(data, message):
    with pytest.raises(UnsafeFileError, match=message):
        parse_delta(data, "file")


@given(st.data())
def test_a_damaged_delta_is_an_error_or_a_delta(data):
    """Whatever the bytes: one of our errors, no other, and never more memory than the file."""
    whole = bytearray(save(factors(), HEAD))
    for _ in range(data.draw(st.integers(1, 4))):
        whole[data.draw(st.integers(0, len(whole) - 1))] = data.draw(st.integers(0, 255))
    try:
        delta, _ = parse_delta(bytes(whole), "file")
    except KnowledgeError:
        return
    assert delta.nbytes() <= len(whole)


@pytest.mark.parametrize("name", ["../x", "deltas/../../x", "/etc/passwd", "", "..", "deltas/.."])
def test_names_that_lead_out_of_the_folder_are_refused(name, tmp_path):
    with pytest.raises(UnsafeFileError, match="inside"):
        confined(tmp_path, name)


def test_links_are_not_followed(tmp_path):
    (tmp_path / "kb").mkdir()
    (tmp_path / "secret").write_text("x")
    (tmp_path / "kb" / "link").symlink_to(tmp_path / "secret")
    (tmp_path / "kb" / "deltas").symlink_to(tmp_path)
    for name in ("link", "deltas/secret"):
        with pytest.raises(UnsafeFileError, match="no link"):
            confined(tmp_path / "kb", name)
    with pytest.raises(UnsafeFileError, match="regular file"):
        read_bytes(tmp_path / "kb" / "link", 10)


def test_only_regular_files_of_a_bounded_size_are_read(tmp_path):
    (tmp_path / "a").write_bytes(b"12345")
    assert read_bytes(tmp_path / "a", 5) == b"12345"
    with pytest.raises(UnsafeFileError, match="at most 4 bytes, got 5"):
        read_bytes(tmp_path / "a", 4)
    with pytest.raises(UnsafeFileError, match="regular file"):
        read_bytes(tmp_path, 4)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(UnsafeFileError, match="regular file"):
            read_bytes(tmp_path / "pipe", 4)


def test_a_write_that_fails_leaves_the_older_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_bytes(path, b"old")

    def fail(descriptor):
        raise OSError("disk")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="disk"):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_a_link_under_the_temporary_name_is_not_written_through(tmp_path):
    (tmp_path / "victim").write_bytes(b"mine")
    (tmp_path / ".a.tmp").symlink_to(tmp_path / "victim")
    write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "victim").read_bytes() == b"mine"
    assert (tmp_path / "a").read_bytes() == b"new"


def manifest(**changes):
    entry = Entry(ID, "a", 1, "active", {file_name(ID, 1): "0" * 64}, (), {"kl": 0.5}, "2026")
    return Manifest("1" * 64, "", "2026", 3, {ID: entry}, **changes)


def test_a_manifest_gives_back_what_it_was():
    whole = manifest(encoder={"rank": 1})
    assert parse_manifest(whole.to_bytes(), "file") == whole


def edited(change):
    content = json.loads(manifest().to_bytes())
    change(content, content["entries"][ID])
    return json.dumps(content).encode()


EDITS = {
    "traversal": lambda m, e: e.update(files={"../../secret": "0" * 64}),
    "other file": lambda m, e: e.update(files={file_name("f" * 32, 1): "0" * 64}),
    "one file more": lambda m, e: e["files"].update({"../../secret": "0" * 64}),
    "no digest": lambda m, e: e.update(files={file_name(ID, 1): "x"}),
    "no file": lambda m, e: e.update(files={}),
    "id": lambda m, e: m["entries"].update({"../x": e}),
    "state": lambda m, e: e.update(state="hidden"),
    "version 0": lambda m, e: e.update(version=0),
    "version as text": lambda m, e: e.update(version="1"),
    "key": lambda m, e: e.update(key=7),
    "unknown field": lambda m, e: e.update(code="import os"),
    "unknown part": lambda m, e: m.update(hook="x"),
    "missing part": lambda m, e: m.pop("created"),
    "format": lambda m, e: m.update(format="gravity-kb/2"),
    "base digest": lambda m, e: m.update(base_digest="../x"),
    "revision": lambda m, e: m.update(revision=-1),
    "two in force": lambda m, e: m["entries"].update(
        {"f" * 32: {**e, "version": 2, "files": {file_name("f" * 32, 2): "0" * 64}}}
    ),
    "entries": lambda m, e: m.update(entries=[]),
}


@pytest.mark.parametrize("change", EDITS.values(), ids=EDITS)
def test_an_edited_manifest_is_refused(change):
    with pytest.raises(UnsafeFileError, match="damaged or was edited"):
        parse_manifest(edited(change), "file")


@pytest.mark.parametrize("data", [b"", b"[]", b"null", b"{", b"[" * 10**5, b"\xff\xfe"])
def test_what_is_no_manifest_is_refused(data):
    with pytest.raises(UnsafeFileError, match="expected a manifest"):
        parse_manifest(data, "file")


def test_a_store_does_not_read_a_delta_through_a_link(tmp_path, llama, random_delta):
    store = BeliefStore.create(tmp_path / "kb", llama)
    belief = store.add_delta("a", random_delta(llama, 1))
    path = store.path / file_name(belief.id, 1)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UnsafeFileError, match="no link"):
        _ = store.get("a").delta
    with pytest.raises(IntegrityError, match="1 differ"):
        store.verify()


def test_leaves_that_are_not_those_of_the_manifest_are_refused(tmp_path, llama):
    store = BeliefStore.create(tmp_path / "kb", llama)
    file = store.path / "base.json"
    content = json.loads(file.read_text())
    content["leaves"]["lm_head.weight"] = "0" * 64
    file.write_text(json.dumps(content))
    with pytest.raises(UnsafeFileError, match="damaged or edited"):
        BeliefStore.open(store.path, llama)
