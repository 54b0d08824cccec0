"""A store: what it adds, changes, takes back, remembers and refuses."""

from __future__ import annotations

import contextlib
import copy
import json
import random
import threading

import pytest
import torch

from gravity_hf.knowledge.delta import LowRankDelta
from gravity_hf.knowledge.encoding_config import EncodingConfig
from gravity_hf.knowledge.errors import (
    DuplicateKeyError,
    IncompatibleBaseError,
    IntegrityError,
    KnowledgeError,
    UnknownKeyError,
    UnsafeFileError,
    ValidationError,
)
from gravity_hf.knowledge.facts import Fact
from gravity_hf.knowledge.store import BeliefStore

FACT = Fact(
    *("geo/capital/france", "geo", "capital", "France", "The capital of France is", "Paris"),
    paraphrases=("France's capital city is", "Paris? No: the capital of France is called", "Q: A:"),
    unrelated=("The capital of Spain is", "The symbol of gold is"),
)


@pytest.fixture(autouse=True)
def _hasty(monkeypatch):
    """Without waiting for the disk, which only a loss of power can tell apart."""
    monkeypatch.setattr("gravity_hf.knowledge.store_files.os.fsync", lambda descriptor: None)


@pytest.fixture
def store(tmp_path, llama):
    return BeliefStore.create(tmp_path / "kb", llama)


@pytest.fixture
def logits(tokenizer, prompts):
    """`logits(model)`: of all prompts, in one batch."""
    inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)

    @torch.no_grad()
    def compute(model):
        return model(**inputs).logits

    return compute


def files_of(store):
    return sorted(path.name for path in (store.path / "deltas").iterdir())


@pytest.mark.parametrize("host", ["llama", "gravity_llama", "gpt2"])
def test_the_base_is_restored_bit_for_bit(host, request, tmp_path, logits, random_delta):
    """Beliefs come and go in random order; each is active in between, alone and with others, by
    peft and by a bank. After every step all prompts have the logits they had."""
    model = request.getfixturevalue(host)
    count = 100 if host == "llama" else 20
    store = BeliefStore.create(tmp_path / "kb", model)
    names = [name for name, _ in model.named_modules()]
    trainable = [p.requires_grad for p in model.parameters()]
    before = logits(model)
    assert len(before) >= 20
    chance = random.Random(0)
    waiting, there = list(range(count)), []
    while waiting or there:
        if waiting and (not there or chance.random() < 0.7):
            number = waiting.pop(chance.randrange(len(waiting)))
            store.add_delta(f"k/{number}", random_delta(model, number))
            there.append(number)
            chosen = {f"k/{number}", f"k/{chance.choice(there)}"}
            with store.active(sorted(chosen)):
                assert not torch.equal(logits(model), before)
        else:
            number = there.pop(chance.randrange(len(there)))
            belief = store.get(f"k/{number}")
            with store.compile_bank([belief.key]).routed([[belief.id]]):
                assert not torch.equal(logits(model), before)
            store.remove(belief.key)
        assert torch.equal(logits(model), before)
    assert len(store) == 0 and store.verify().files == count
    assert [name for name, _ in model.named_modules()] == names
    assert [p.requires_grad for p in model.parameters()] == trainable
    assert not hasattr(model, "peft_config")


def test_a_reloaded_store_gives_the_same_bits(store, llama, logits, random_delta):
    for i in range(5):
        store.add_delta(f"k/{i}", random_delta(llama, i), {"number": i})
    base = logits(llama)
    with store.active(["k/1", "k/4"]):
        expected = logits(llama)
    again = BeliefStore.open(store.path, llama)
    assert again.keys() == store.keys() and again.get("k/3").metadata == {"number": 3}
    with again.active(["k/1", "k/4"]):
        assert torch.equal(logits(llama), expected)
    for key in again:
        again.remove(key)
    assert torch.equal(logits(llama), base)


def test_the_order_of_keys_changes_no_bit(store, llama, logits, random_delta):
    keys = [store.add_delta(f"k/{i}", random_delta(llama, i)).key for i in range(7)]
    results = []
    for seed in range(5):
        random.Random(seed).shuffle(keys)
        with store.active(keys):
            results.append(logits(llama))
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_key_twice_is_an_error_and_changes_nothing(store, llama, random_delta):
    first = store.add_delta("a", random_delta(llama, 1))
    with pytest.raises(DuplicateKeyError, match="'a'"):
        store.add_delta("a", random_delta(llama, 2))
    assert store.get("a") == first and store.revision == 1
    assert files_of(store) == [f"{first.id}-v1.safetensors"]


def test_versions_follow_each_other_and_can_come_back(store, llama, random_delta):
    deltas = [random_delta(llama, seed) for seed in range(3)]
    one = store.add_delta("a", deltas[0], report={"top1": True, "kl": 0.5, "text": "-"})
    two = store.update_delta("a", deltas[1])
    assert store.get("a") == two and two.version == 2
    assert [(v.version, v.state) for v in store.history("a")] == [(1, "superseded"), (2, "active")]
    assert store.history("a")[1].parents == (one.id,)
    assert store.history("a")[0].metrics == {"top1": True, "kl": 0.5}
    three = store.rollback("a", 1)
    assert three.version == 3 and store.get("a").report == {"top1": True, "kl": 0.5, "text": "-"}
    name = next(iter(deltas[0].factors))
    assert torch.equal(three.delta.factors[name][0], deltas[0].factors[name][0])
    assert [v.state for v in store.history("a")] == ["superseded", "superseded", "active"]
    # A belief that was handed out stays what it was.
    assert torch.equal(two.delta.factors[name][0], deltas[1].factors[name][0])
    assert store.by_id(two.id).version == 2


def test_a_removed_key_comes_back_and_a_purged_one_does_not(store, llama, random_delta):
    store.add_delta("a", random_delta(llama, 1))
    store.remove("a")
    assert "a" not in store and len(files_of(store)) == 1
    with pytest.raises(UnknownKeyError, match="removed; rollback"):
        store.get("a")
    assert store.rollback("a", 1).version == 2
    store.remove("a", purge=True)
    assert files_of(store) == []
    assert [v.state for v in store.history("a")] == ["purged", "purged"]
    with pytest.raises(UnknownKeyError, match="purged"):
        store.rollback("a", 1)
    assert store.add_delta("a", random_delta(llama, 1)).version == 3
    store.verify()


def test_what_is_not_there_is_named(store, llama, random_delta):
    for call in (store.get, store.remove, store.history, store.by_id):
        with pytest.raises(UnknownKeyError, match="nowhere"):
            call("nowhere")
    with pytest.raises(UnknownKeyError, match="nowhere"):
        store.update_delta("nowhere", random_delta(llama, 1))
    store.add_delta("a", random_delta(llama, 1))
    with pytest.raises(UnknownKeyError, match=r"\[1\], got 2"):
        store.rollback("a", 2)


@pytest.mark.parametrize("key", ["", " a", "a\n", "a\x00b", "x" * 513, 7])
def test_keys_are_printable_text(key, store, llama, random_delta):
    with pytest.raises(ValidationError, match="printable"):
        store.add_delta(key, random_delta(llama, 1))


def test_a_transaction_is_all_or_nothing(store, llama, random_delta):
    store.add_delta("old", random_delta(llama, 0))
    manifest = (store.path / "manifest.json").read_bytes()
    with pytest.raises(ZeroDivisionError), store.transaction():
        store.add_delta("new", random_delta(llama, 1))
        store.remove("old", purge=True)
        assert store.keys() == ["new"] and store.get("new").delta.parameters() > 0
        _ = 1 / 0
    assert store.keys() == ["old"] and store.revision == 1
    assert (store.path / "manifest.json").read_bytes() == manifest and len(files_of(store)) == 1
    with store.transaction():
        store.add_delta("new", random_delta(llama, 1))
        store.remove("old")
        with pytest.raises(DuplicateKeyError):
            store.add_delta("new", random_delta(llama, 2))
        with pytest.raises(KnowledgeError, match="open transaction"):
            store.reload()
    assert store.keys() == ["new"] and store.revision == 2
    assert BeliefStore.open(store.path, llama).keys() == ["new"]


def test_no_two_states_have_one_revision(store, llama, random_delta):
    """What somebody keeps by revision, read in a transaction, is not taken for what came later."""
    seen = [store.revision]
    for fails in (True, False):
        with contextlib.suppress(ZeroDivisionError), store.transaction():
            for i in range(2):
                store.add_delta(f"{fails}/{i}", random_delta(llama, i))
                seen.append(store.revision)
            _ = 1 / (not fails)
    seen.append(store.revision)
    store.remove("False/0")
    seen.append(store.revision)
    assert len(set(seen)) == len(seen) == 7 and seen[-2:] == [1, 2]


def test_a_part_that_failed_leaves_the_rest_of_its_transaction(store, llama, random_delta):
    with store.transaction():
        store.add_delta("a", random_delta(llama, 1))
        with pytest.raises(ZeroDivisionError), store.transaction():
            store.add_delta("b", random_delta(llama, 2))
            _ = 1 / 0
    assert store.keys() == ["a"] and len(files_of(store)) == 1


def test_other_threads_do_not_see_an_open_transaction(store, llama, random_delta):
    seen = []
    with store.transaction():
        store.add_delta("a", random_delta(llama, 1))
        thread = threading.Thread(target=lambda: seen.append(store.keys()))
        thread.start()
        thread.join()
    assert seen == [[]] and store.keys() == ["a"]


def test_a_disk_that_fails_leaves_everything_as_it_was(store, llama, random_delta, monkeypatch):
    from gravity_hf.knowledge import store_files

    store.add_delta("old", random_delta(llama, 0))
    before = (store.path / "manifest.json").read_bytes(), files_of(store)
    replace = store_files.os.replace
    for failing in (1, 2):
        calls = []

        def full(source, target, calls=calls, failing=failing):
            calls.append(target)
            if len(calls) == failing:
                raise OSError("No space left on device")
            return replace(source, target)

        monkeypatch.setattr(store_files.os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            store.add_delta("new", random_delta(llama, 1))
        monkeypatch.undo()
        assert ((store.path / "manifest.json").read_bytes(), files_of(store)) == before
        assert store.keys() == ["old"] and store.revision == 1
    store.add_delta("new", random_delta(llama, 1))


def test_another_base_is_refused_by_name(store, llama, tokenizer, tmp_path):
    other = copy.deepcopy(llama)
    other.lm_head.weight.data.view(torch.int32)[3, 4] ^= 1
    with pytest.raises(IncompatibleBaseError, match="changed: lm_head.weight"):
        BeliefStore.open(store.path, other)
    kept = BeliefStore.create(tmp_path / "with", llama, tokenizer)
    BeliefStore.open(kept.path, llama)
    changed = copy.deepcopy(tokenizer)
    changed.add_tokens(["gravity"])
    with pytest.raises(IncompatibleBaseError, match=r"changed: \(tokenizer\)"):
        BeliefStore.open(kept.path, llama, changed)


def test_verify_names_tensors_and_files(tmp_path, llama, random_delta):
    model = copy.deepcopy(llama)
    store = BeliefStore.create(tmp_path / "kb", model)
    paths = [
        store.path / "deltas" / f"{store.add_delta(key, random_delta(model, i)).id}-v1.safetensors"
        for i, key in enumerate("abc")
    ]
    assert store.verify() == (len(store.base_digest.leaves) + 2, 3)
    model.model.norm.weight.data.view(torch.int32)[0] ^= 1
    model.model.rotary_emb.inv_freq.view(torch.int32)[1] ^= 1
    data = bytearray(paths[0].read_bytes())
    data[-1] ^= 1
    paths[0].write_bytes(data)
    paths[1].unlink()
    with pytest.raises(IntegrityError, match="4 differ") as caught:
        store.verify()
    files = sorted(f"deltas/{path.name}" for path in paths[:2])
    assert sorted(caught.value.names) == sorted(
        ["model.norm.weight", "model.rotary_emb.inv_freq", *files]
    )
    for key in "ab":
        with pytest.raises(IntegrityError, match="got others|got no file"):
            _ = store.get(key).delta
    assert store.get("c").delta.parameters() > 0


def test_deltas_of_another_base_are_refused_before_anything_is_written(store, gpt2, random_delta):
    with pytest.raises(IncompatibleBaseError):
        store.add_delta("a", random_delta(gpt2, 1))
    broken = random_delta(store.model, 1)
    next(iter(broken.factors.values()))[0][0, 0] = torch.nan
    with pytest.raises(UnsafeFileError, match="finite"):
        store.add_delta("a", broken)
    with pytest.raises(ValidationError, match="metadata"):
        store.add_delta("a", random_delta(store.model, 1), {"x": object()})
    assert store.revision == 0 and not (store.path / "deltas").exists()


def test_numbers_that_json_lacks_do_not_spoil_the_manifest(store, llama, random_delta):
    store.add_delta("a", random_delta(llama, 1), report={"kl": float("nan"), "top1": 1.0})
    again = BeliefStore.open(store.path, llama)
    assert again.get("a").metrics == {"top1": 1.0} and again.get("a").report["kl"] == "NaN"


def test_a_store_is_made_in_an_empty_folder_only(tmp_path, llama, store):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "thesis.txt").write_text("mine")
    with pytest.raises(ValidationError, match="thesis.txt"):
        BeliefStore.create(tmp_path / "used", llama)
    with pytest.raises(ValidationError, match="base.json"):
        BeliefStore.create(store.path, llama)
    with pytest.raises(UnsafeFileError, match=r"without manifest.json"):
        BeliefStore.open(tmp_path / "used", llama)
    assert (tmp_path / "used" / "thesis.txt").read_text() == "mine"


def test_foreign_files_beside_are_left_alone(store, llama, random_delta):
    store.add_delta("a", random_delta(llama, 1))
    for name in ("notes.txt", "deltas/other.safetensors"):
        (store.path / name).write_text("mine")
    store.remove("a", purge=True)
    assert (store.path / "notes.txt").exists() and files_of(store) == ["other.safetensors"]
    assert BeliefStore.open(store.path, llama).verify().files == 0


def test_facts_are_encoded_with_the_settings_of_the_store(tmp_path, llama, tokenizer, logits):
    settings = EncodingConfig(rank=1, steps=2, budget_fraction=1.0, generic_prompts=0)
    store = BeliefStore.create(tmp_path / "kb", llama, tokenizer, settings)
    before = logits(llama)
    belief = store.add(
        "The capital of Spain is", "Madrid", aliases=["Madrid city"], key="geo/spain"
    )
    assert belief.fact.answers == ("Madrid", "Madrid city") and belief.fact.domain == "geo"
    assert belief.delta.rank(next(iter(belief.delta.factors))) == 1
    assert {"top1", "kl_unrelated"} <= set(belief.report)
    assert json.loads(json.dumps(belief.metrics)) == belief.metrics and "steps" in belief.metrics
    again = BeliefStore.open(store.path, llama, tokenizer)
    whole = again.add(FACT, steps=1)
    assert whole.key == FACT.id and again.get(FACT.id).fact == FACT
    newer = again.update(FACT.id, "Lyon")
    assert newer.version == 2 and newer.fact.answer == "Lyon"
    assert newer.fact.prompts == FACT.prompts and newer.fact.aliases == ()
    assert again.rollback(FACT.id, 1).fact == FACT
    named = again.add("Water boils at", "100", steps=1)
    assert named.key.startswith("water-boils-at-")
    assert torch.equal(logits(llama), before)


def test_many_facts_are_added_together_or_not_at_all(tmp_path, llama, tokenizer):
    settings = EncodingConfig(rank=1, steps=1, budget_fraction=1.0, generic_prompts=0)
    store = BeliefStore.create(tmp_path / "kb", llama, tokenizer, settings)
    facts = [Fact(f"f/{i}", "f", "r", "s", f"Number {i} is", "odd") for i in range(3)]
    with pytest.raises(ValidationError, match="one twice"):
        store.add_many([facts[0], facts[0]])
    beliefs = store.add_many(facts, progress=False)
    assert [belief.key for belief in beliefs] == ["f/0", "f/1", "f/2"] and store.revision == 1
    with pytest.raises(DuplicateKeyError):
        store.add_many([Fact("f/9", "f", "r", "s", "Nine is", "odd"), facts[1]])
    assert len(store) == 3


def test_what_add_cannot_use_is_refused(tmp_path, llama, store, random_delta):
    with pytest.raises(ValidationError, match="tokenizer"):
        store.add("The capital of France is", "Paris")
    with pytest.raises(ValidationError, match="an answer"):
        store.add("The capital of France is")
    with pytest.raises(ValidationError, match="a Fact alone"):
        store.add(FACT, "Paris")
    store.add_delta("a", random_delta(llama, 1))
    with pytest.raises(ValidationError, match="has no fact"):
        store.update("a", "Lyon")


def test_routed_rows_have_what_the_router_finds(store, llama, prompts, tokenizer, random_delta):
    beliefs = [store.add_delta(f"k/{i}", random_delta(llama, i)) for i in range(2)]

    class Named:
        def rows(self, texts):
            return [[beliefs[int(text[0])].id] if text[0] in "01" else [] for text in texts]

    inputs = tokenizer(prompts[:3], return_tensors="pt", padding=True, return_token_type_ids=False)
    with torch.no_grad():
        base = llama(**inputs).logits
        with store.routed(Named(), ["0", "none", "1"]) as rows:
            mixed = llama(**inputs).logits
        assert rows == [[beliefs[0].id], [], [beliefs[1].id]]
        assert torch.equal(mixed[1], base[1])
        for row, belief in ((0, beliefs[0]), (2, beliefs[1])):
            with store.active([belief.key]):
                alone = llama(**inputs).logits
            assert not torch.equal(mixed[row], base[row])
            torch.testing.assert_close(mixed[row], alone[row], rtol=1e-5, atol=1e-5)


def test_a_bank_and_peft_give_the_same_sum(store, llama, logits, random_delta):
    for i in range(6):
        store.add_delta(f"k/{i}", random_delta(llama, i, rank=1 + i % 3))
    with store.active(store.keys()):
        by_peft = logits(llama)
    with store.compile_bank().routed([[store.get(key).id for key in store]]):
        by_bank = logits(llama)
    assert (by_peft - by_bank).abs().max() <= 1e-6 * by_peft.abs().max()


def test_nothing_active_is_the_base(store, llama, logits):
    before = logits(llama)
    with store.active([]):
        assert torch.equal(logits(llama), before)


def test_equality_of_beliefs_is_of_versions(store, llama, random_delta):
    belief = store.add_delta("a", random_delta(llama, 1))
    assert store.get("a") == belief and hash(store.get("a")) == hash(belief)
    assert store.update_delta("a", LowRankDelta(dict(belief.delta.factors))) != belief
    assert list(store) == ["a"] and "a" in store
