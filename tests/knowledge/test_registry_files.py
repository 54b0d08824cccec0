"""The registry on disk: rebuilt bit for bit, or refused; whole or as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from gravity_hf.knowledge import registry_files
from gravity_hf.knowledge.delta import target_modules
from gravity_hf.knowledge.errors import (
    IncompatibleBaseError,
    IntegrityError,
    InterferenceError,
    KnowledgeError,
)
from gravity_hf.knowledge.moments import prompt_moments
from gravity_hf.knowledge.registry import Registry
from gravity_hf.knowledge.store import BeliefStore

LOOSE = {"angle_min": 0.0, "leakage_max": 1e9, "generic_max": 1e9}


@pytest.fixture
def store(llama, tokenizer, tmp_path) -> BeliefStore:
    return BeliefStore.create(tmp_path / "kb", llama, tokenizer)


@pytest.fixture
def registry(store, llama, tokenizer, random_delta) -> Registry:
    """Three deltas with moments, moments of unrelated text, saved."""
    registry = Registry(store, **LOOSE)
    names = target_modules(llama, "all")
    text = ["The capital of France is Paris. Water boils. " * 20]
    registry.measure_generic(tokenizer, text, names, tokens=100, progress=False)
    moments = prompt_moments(llama, tokenizer, names, ["The capital of France is"])
    for seed, key in enumerate("cab"):
        registry.register(key, random_delta(llama, seed, rank=2, layers="all"), moments)
    registry.save()
    return registry


def folder_of(store: BeliefStore) -> Path:
    return Path(store.path) / "registry"


def content(store: BeliefStore) -> dict[str, bytes]:
    files = folder_of(store).iterdir()
    return {f.name: f.read_bytes() for f in files if not f.name.startswith(".")}


def test_registry_that_is_read_equals_the_one_that_was_written(store, registry, llama) -> None:
    again = Registry(store, **LOOSE)
    assert again.ids == registry.ids == ["c", "a", "b"]
    assert again.capacity_report() == registry.capacity_report()
    for name in target_modules(llama, "all"):
        for side in ("input", "output"):
            assert torch.equal(again.basis(name, side), registry.basis(name, side))
        for key in registry.ids:
            a, b = again[key].moments[name], registry[key].moments[name]
            assert torch.equal(a.kept, b.kept) and a.output_energy == b.output_energy
        assert torch.equal(again.generic[name].kept, registry.generic[name].kept)
    delta = registry["a"].delta.scaled(2.0)
    assert again.check(delta).to_dict() == registry.check(delta).to_dict()


def test_unregistered_deltas_leave_no_file(store, registry) -> None:
    before = content(store)
    registry.unregister("a")
    registry.save()
    after = content(store)
    assert len(after) == len(before) - 1
    assert Registry(store, **LOOSE).ids == ["c", "b"]
    named = json.loads(after["registry.json"])
    files = {entry["file"] for entry in [*named["members"], named["generic"]]}
    assert files == set(after) - {"registry.json"}


def test_every_damaged_file_is_named(store, registry) -> None:
    for file in folder_of(store).glob("*.safetensors"):
        whole = file.read_bytes()
        for damaged in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:-4]):
            file.write_bytes(damaged)
            with pytest.raises(IntegrityError) as caught:
                Registry(store, **LOOSE)
            assert caught.value.names == [file.name]
        file.unlink()
        with pytest.raises(IntegrityError, match="no such file"):
            Registry(store, **LOOSE)
        file.write_bytes(whole)
    Registry(store, **LOOSE)


@pytest.mark.parametrize("text", ["{", "[]", '{"format": "gravity-registry/2", "revision": 1}'])
def test_state_of_another_format_is_refused(store, registry, text) -> None:
    (folder_of(store) / "registry.json").write_text(text)
    with pytest.raises(IntegrityError, match="registry.json"):
        Registry(store, **LOOSE)


def test_paths_outside_of_the_folder_are_not_opened(store, registry, tmp_path) -> None:
    """Content decides the name; a name in the JSON that leads elsewhere is damage."""
    file = folder_of(store) / "registry.json"
    state = json.loads(file.read_text())
    entry = state["members"][0]
    inside = folder_of(store) / entry["file"]
    (tmp_path / "kb" / entry["file"]).write_bytes(inside.read_bytes())
    for name, digest in ((f"../{entry['file']}", entry["sha256"]), (entry["file"], "../../x")):
        entry["file"], entry["sha256"] = name, digest
        file.write_text(json.dumps(state))
        with pytest.raises(IntegrityError):
            Registry(store, **LOOSE)


def test_registry_of_another_base_is_refused(store, registry) -> None:
    file = folder_of(store) / "registry.json"
    state = json.loads(file.read_text())
    state["base"] = "0" * 64
    file.write_text(json.dumps(state))
    with pytest.raises(IncompatibleBaseError, match="000000000000"):
        Registry(store, **LOOSE)


def test_what_another_process_wrote_is_not_overwritten(
    store, registry, llama, random_delta
) -> None:
    other = Registry(store, **LOOSE)
    other.register("d", random_delta(llama, 9, layers="all"))
    other.save()
    registry.register("e", random_delta(llama, 10, layers="all"))
    before = content(store)
    with pytest.raises(KnowledgeError, match="another process"):
        registry.save()
    with pytest.raises(KnowledgeError, match="unsaved"):
        registry.refresh()
    assert content(store) == before
    registry.reload()
    assert "d" in registry and "e" not in registry


def test_refresh_sees_what_others_wrote(store, registry) -> None:
    other = Registry(store, **LOOSE)
    other.unregister("a")
    other.save()
    registry.refresh()
    assert registry.ids == ["c", "b"]


def test_nothing_is_written_where_nothing_changed(store, registry, monkeypatch) -> None:
    before = content(store)
    monkeypatch.setattr(registry_files, "_replace", None)  # any write would raise
    registry.save()
    with registry.transaction():
        pass
    assert content(store) == before


@pytest.mark.parametrize("at", range(2))
def test_a_write_that_fails_leaves_what_was_there(
    store, registry, llama, random_delta, monkeypatch, at
) -> None:
    """At the new delta's file, and at the state's renaming."""
    before, written = content(store), []
    really = registry_files._replace

    def failing(file: Path, data: bytes) -> None:
        if len(written) == at:
            raise OSError("disk full")
        written.append(file)
        really(file, data)

    monkeypatch.setattr(registry_files, "_replace", failing)
    ids = registry.ids
    with pytest.raises(OSError, match="disk full"), registry.transaction():
        registry.register("d", random_delta(llama, 9, layers="all"))
    assert registry.ids == ids
    after = content(store)
    assert {name: after[name] for name in before} == before
    monkeypatch.undo()
    assert Registry(store, **LOOSE).ids == ids


def test_transaction_that_was_saved_inside_and_fails_is_undone_on_disk(
    store, registry, llama, random_delta
) -> None:
    ids = registry.ids
    with pytest.raises(InterferenceError), registry.transaction():
        registry.unregister("a")
        registry.save()
        assert Registry(store, **LOOSE).ids == ["c", "b"]
        raise InterferenceError("later")
    assert registry.ids == Registry(store, **LOOSE).ids == ids


def test_ids_that_the_store_does_not_have_are_strangers(store, llama, random_delta) -> None:
    registry = Registry(store, **LOOSE)
    delta = random_delta(llama, 0, layers="all")
    belief = store.add_delta("k", delta)
    registry.register(belief.id, delta)
    assert registry.strangers() == []
    store.remove("k")
    assert registry.strangers() == [belief.id]


def test_a_transaction_that_fails_does_not_undo_what_another_process_wrote(
    store, registry, llama, random_delta
) -> None:
    """It was read inside: going back to what was there before would delete it on disk."""
    other = Registry(store, **LOOSE)
    other.register("d", random_delta(llama, 9, layers="all"))
    other.save()
    with pytest.raises(InterferenceError), registry.transaction():
        registry.refresh()
        registry.register("e", random_delta(llama, 10, layers="all"))
        registry.save()
        raise InterferenceError("later")
    assert registry.ids == Registry(store, **LOOSE).ids == other.ids == ["c", "a", "b", "d"]
