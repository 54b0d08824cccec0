"""Beliefs merged into one: measured first, all or nothing, and undone by rollback."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from knowledge.taught import doubled, facts, joint_delta, own_deltas

from gravity_hf.knowledge.consolidation import Tolerance, consolidate, facts_of
from gravity_hf.knowledge.delta import LowRankDelta
from gravity_hf.knowledge.errors import (
    DuplicateKeyError,
    InterferenceError,
    KnowledgeError,
    UnknownKeyError,
    ValidationError,
)
from gravity_hf.knowledge.registry import Registry
from gravity_hf.knowledge.store import BeliefStore

ANY_KL = Tolerance(kl=100.0)
KEYS = [fact.id for fact in facts()]
REPORT = {"training_prompts": ["The symbol of gold is"], "exact": True}


@pytest.fixture
def store(tmp_path, llama, tokenizer):
    """Three beliefs that have directions in common; the first one alone knows all three facts."""
    store = BeliefStore.create(tmp_path / "kb", llama, tokenizer)
    joint = joint_delta(llama, tokenizer)
    for fact, weight in zip(facts(), (1.0, 1e-3, 1e-3), strict=True):
        store.add_delta(fact.id, doubled(joint).scaled(weight), None, fact, REPORT)
    return store


@pytest.fixture
def registry(store):
    registry = Registry(store, angle_min=0.0, leakage_max=1e9, generic_max=1e9)
    for key in KEYS:
        registry.register(store.get(key).id, store.get(key).delta)
    registry.save()
    return registry


def logits(store, keys, prompt="The symbol of iron is"):
    ids = store.tokenizer(prompt, return_tensors="pt").input_ids
    with torch.no_grad(), store.active(keys):
        return store.model(ids).logits


def state(store, registry):
    """All that a failure must leave as it was, on disk and in memory."""
    files = {
        str(path.relative_to(store.path)): path.read_bytes()
        for path in (store.path / "manifest.json", store.path / "registry" / "registry.json")
    }
    fields = json.loads(files["registry/registry.json"])
    fields.pop("revision")  # counts the writes that took back what was written
    files["registry/registry.json"] = json.dumps(fields).encode()
    memory = (store.keys(), store.revision, [store.get(key).id for key in store])
    return files, memory, registry.ids, registry.capacity()


def test_beliefs_that_share_directions_become_one(store, registry):
    before, free = logits(store, KEYS), registry.capacity()
    report = consolidate(store, registry, KEYS, tolerance=ANY_KL)
    assert report.replaced and report.exact_before == 1 and report.exact_after == 3
    assert report.lost == () and report.facts == 3
    assert store.keys() == [report.key] == ["consolidated/symbol/gold"]
    torch.testing.assert_close(logits(store, [report.key]), before, rtol=0.05, atol=0.05)
    # What is freed was measured: by the registry, and by the parameters on disk.
    assert report.parameters_after < report.parameters_before / 5
    assert registry.ids == [report.belief_id]
    after = registry.capacity()
    assert report.freed == {name: after[name] - free[name] for name in free}


def test_the_merged_belief_knows_its_facts(store):
    report = consolidate(store, keys=KEYS, tolerance=ANY_KL)
    belief = store.get(report.key)
    assert [fact.id for fact in facts_of(belief)] == KEYS
    assert belief.metadata["keys"] == KEYS and len(belief.metadata["parents"]) == 3
    assert belief.report["training_prompts"] == REPORT["training_prompts"]


def test_rollback_brings_every_source_back(store):
    exact = {key: store.get(key).delta for key in KEYS}
    report = consolidate(store, keys=KEYS, tolerance=ANY_KL)
    store.remove(report.key)
    for key in KEYS:
        store.rollback(key, 1)
        for name, pair in store.get(key).delta.factors.items():
            assert all(map(torch.equal, pair, exact[key].factors[name]))
    assert store.keys() == sorted(KEYS)


def test_a_domain_is_all_its_facts_also_merged_ones(store):
    first = consolidate(store, keys=KEYS[:2], tolerance=ANY_KL)
    second = consolidate(store, domain="chemistry", tolerance=ANY_KL)
    assert second.sources == (first.key, KEYS[2]) and second.facts == 3
    assert [fact.id for fact in facts_of(store.get(second.key))] == KEYS


def test_orthogonal_deltas_are_left_alone_and_it_is_said_why(tmp_path, llama, random_delta):
    store = BeliefStore.create(tmp_path / "kb", llama)
    shapes = random_delta(llama, 0).factors
    for i in range(4):
        delta = LowRankDelta(
            {
                name: (torch.eye(1, A.shape[1]).roll(i, 1), torch.eye(len(B), 1).roll(i, 0))
                for name, (A, B) in shapes.items()
            }
        )
        store.add_delta(f"k{i}", delta)
    before = (store.path / "manifest.json").read_bytes()
    report = consolidate(store, keys=[f"k{i}" for i in range(4)], validate=False)
    assert not report.replaced and "share no directions" in report.reason
    assert all(module.rank_after == module.rank_before == 4 for module in report.modules.values())
    assert set(report.freed.values()) == {0}
    assert (store.path / "manifest.json").read_bytes() == before


def test_lost_facts_stop_it(tmp_path, llama, tokenizer):
    """Facts trained apart disturb each other once they are active together: nothing is changed."""
    store = BeliefStore.create(tmp_path / "kb", llama, tokenizer)
    for fact, delta in zip(facts(), own_deltas(llama, tokenizer), strict=True):
        store.add_delta(fact.id, doubled(delta), None, fact)
    before = (store.path / "manifest.json").read_bytes()
    with pytest.raises(ValidationError, match="facts lost .symbol/gold") as raised:
        consolidate(store, keys=KEYS, energy=0.9, tolerance=ANY_KL)
    assert "Nothing was changed" in str(raised.value)
    assert (store.path / "manifest.json").read_bytes() == before and store.keys() == sorted(KEYS)
    report = consolidate(store, keys=KEYS, energy=0.9, tolerance=ANY_KL, dry_run=True)
    assert report.exact_before == 3 and set(report.lost) <= set(KEYS) and report.lost
    assert "would be refused" in report.reason and not report.replaced


def test_changes_at_unrelated_prompts_stop_it(store):
    with pytest.raises(ValidationError, match="KL at unrelated prompts"):
        consolidate(store, keys=KEYS)


def test_lost_paraphrases_stop_it(store):
    strict = Tolerance(paraphrases=-1.0, kl=100.0)  # as if all of them had to become better
    with pytest.raises(ValidationError, match="paraphrases fell by"):
        consolidate(store, keys=KEYS, tolerance=strict)


def test_a_dry_run_measures_everything_and_changes_nothing(store, registry):
    before = state(store, registry)
    report = consolidate(store, registry, KEYS, tolerance=ANY_KL, dry_run=True)
    assert not report.replaced and report.belief_id is None and "dry run" in report.reason
    assert state(store, registry) == before
    real = consolidate(store, registry, KEYS, tolerance=ANY_KL)
    assert (report.freed, report.modules, report.exact_after) == (
        real.freed,
        real.modules,
        real.exact_after,
    )


@pytest.mark.parametrize(
    "step, call",
    [
        ("store.add_delta", 1),
        ("store.remove", 1),
        ("store.remove", 3),
        ("registry.unregister", 1),
        ("registry.unregister", 3),
        ("registry.register", 1),
        ("registry.save", 1),
    ],
)
def test_a_failure_at_any_step_changes_nothing(store, registry, monkeypatch, step, call):
    owner, name = step.split(".")
    target = {"store": store, "registry": registry}[owner]
    real, calls = getattr(target, name), []

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            raise OSError("injected")
        return real(*args, **kwargs)

    before = state(store, registry)
    monkeypatch.setattr(target, name, failing)
    with pytest.raises(OSError, match="injected"):
        consolidate(store, registry, KEYS, tolerance=ANY_KL)
    monkeypatch.undo()
    assert state(store, registry) == before
    reopened = BeliefStore.open(store.path, store.model, store.tokenizer)
    assert reopened.keys() == sorted(KEYS)
    assert Registry(reopened).ids == registry.ids and Registry(reopened).strangers() == []


def test_a_failure_at_any_write_changes_nothing(store, registry, monkeypatch):
    """The disk fails at the first renaming, at the second, and so on until none is left."""
    real, before, failures = os.replace, state(store, registry), 0
    while True:
        calls = []

        def failing(source, target, calls=calls, left=failures):
            calls.append(Path(target).name)
            if len(calls) == left + 1:
                raise OSError("injected")
            return real(source, target)

        monkeypatch.setattr(os, "replace", failing)
        try:
            report = consolidate(store, registry, KEYS, tolerance=ANY_KL)
            break
        except OSError:
            failures += 1
            assert state(store, registry) == before
    assert report.replaced
    # The last renaming is that of the manifest: what makes it real.
    assert failures >= 4 and calls[-1] == "manifest.json"


def test_a_registry_that_refuses_changes_nothing(store):
    registry = Registry(store, angle_min=0.0, leakage_max=1e9, generic_max=1e9)
    joint = joint_delta(store.model, store.tokenizer)
    registry.register("other", joint)
    registry.limits = type(registry.limits)(0.3, 1e9, 1e9, False)
    registry.save()
    before = state(store, registry)
    with pytest.raises(InterferenceError):
        consolidate(store, registry, KEYS, tolerance=ANY_KL)
    assert state(store, registry) == before


def test_what_was_measured_must_still_be_there(store, monkeypatch):
    """Another writer updates a source between measuring and replacing."""
    from gravity_hf.knowledge import consolidation

    real = consolidation.no_gain

    def meanwhile(report):
        other = BeliefStore.open(store.path, store.model, store.tokenizer)
        other.update_delta(KEYS[0], store.get(KEYS[0]).delta.scaled(2.0))
        return real(report)

    monkeypatch.setattr(consolidation, "no_gain", meanwhile)
    with pytest.raises(KnowledgeError, match="changed meanwhile"):
        consolidate(store, keys=KEYS, tolerance=ANY_KL)
    assert store.keys() == sorted(KEYS)


def test_wrong_requests_are_refused(store):
    store.add_delta("bare", store.get(KEYS[0]).delta)
    for error, match, arguments in [
        (ValidationError, "either keys or a domain", {}),
        (ValidationError, "either keys or a domain", {"keys": KEYS, "domain": "chemistry"}),
        (ValidationError, "at least two", {"keys": KEYS[:1]}),
        (ValidationError, "at least two", {"domain": "history"}),
        (ValidationError, "list of keys", {"keys": "symbol/gold"}),
        (ValidationError, "a fact with every belief", {"keys": [KEYS[0], "bare"]}),
        (UnknownKeyError, "no/such", {"keys": [KEYS[0], "no/such"]}),
        (DuplicateKeyError, "new key", {"keys": KEYS, "key": KEYS[0]}),
    ]:
        with pytest.raises(error, match=match):
            consolidate(store, **arguments)


def test_the_report_goes_into_json(store):
    report = consolidate(store, keys=KEYS, tolerance=ANY_KL, dry_run=True)
    found = json.loads(json.dumps(report.to_dict()))
    assert found["per_fact"][0]["id"] == KEYS[0] and found["modules"]
