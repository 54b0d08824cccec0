"""A belief in packed codes: small on disk, checked when read, undone by rollback."""

from __future__ import annotations

import json

import pytest
import torch
from knowledge.taught import facts, joint_delta, own_deltas
from safetensors.torch import load_file

from gravity_hf.knowledge import quantized_beliefs
from gravity_hf.knowledge.errors import (
    IntegrityError,
    InterferenceError,
    QuantizationError,
    ValidationError,
)
from gravity_hf.knowledge.quantized_beliefs import quantize_belief
from gravity_hf.knowledge.quantized_delta import Tier
from gravity_hf.knowledge.registry import Registry
from gravity_hf.knowledge.store import BeliefStore

FACT = facts()[0]
TRAINED = {"training_prompts": [FACT.prompt, FACT.paraphrases[0]], "exact": True}


@pytest.fixture
def store(tmp_path, llama, tokenizer):
    store = BeliefStore.create(tmp_path / "kb", llama, tokenizer)
    store.add_delta(FACT.id, own_deltas(llama, tokenizer)[0], {"note": 1}, FACT, TRAINED)
    return store


def file_of(store, key):
    belief = store.get(key)
    return store.path / "deltas" / f"{belief.id}-v{belief.version}.safetensors"


def test_the_codes_are_what_is_on_disk_and_what_is_used(store, llama, tokenizer):
    exact = own_deltas(llama, tokenizer)[0]
    report = quantize_belief(store, FACT.id, 2)
    belief = BeliefStore.open(store.path, llama, tokenizer).get(FACT.id)
    assert belief.version == 2 and belief.fact == FACT and belief.metadata == {"note": 1}
    assert belief.report["precision"]["bits"] == report.bits
    assert belief.report["training_prompts"] == TRAINED["training_prompts"]
    assert belief.report["exact"] is True
    errors = [
        float((belief.delta.update(name) - exact.update(name)).norm() / exact.update(name).norm())
        for name in exact.factors
    ]
    assert 0 < max(errors) <= 0.10 and max(errors) == pytest.approx(report.rel_frobenius, rel=1e-4)
    assert load_file(file_of(store, FACT.id))["codes"].dtype == torch.uint8


def test_rollback_brings_the_exact_delta_back(store, llama, tokenizer):
    exact = own_deltas(llama, tokenizer)[0]
    quantize_belief(store, FACT.id, 3)
    back = store.rollback(FACT.id, 1)
    for name, pair in back.delta.factors.items():
        assert all(map(torch.equal, pair, exact.factors[name]))


def test_a_coded_belief_is_used_like_any_other(store, llama, tokenizer):
    quantize_belief(store, FACT.id, 1)
    belief = store.get(FACT.id)
    ids = tokenizer(FACT.prompt, return_tensors="pt").input_ids
    with torch.no_grad():
        with store.active([FACT.id]):
            by_peft = llama(ids).logits
        with store.compile_bank().routed([[belief.id]]):
            by_bank = llama(ids).logits
    torch.testing.assert_close(by_peft, by_bank, rtol=1e-4, atol=1e-4)
    store.verify()


def test_a_tier_that_cannot_be_met_changes_nothing(store):
    before = (store.path / "manifest.json").read_bytes()
    with pytest.raises(QuantizationError, match="Measured"):
        quantize_belief(store, FACT.id, 1, widths=(2, 3))
    assert (store.path / "manifest.json").read_bytes() == before
    assert store.get(FACT.id).version == 1


def test_a_lost_answer_stops_it(store, monkeypatch):
    """Two bits are asked for and allowed; whether the fact survives them is asked of the model."""
    anything = Tier(9, frobenius=100.0, routing_cosine=-1.0, angle=0.0)
    real, calls = quantized_beliefs.evaluate_facts, []

    def with_the_coded_one_wrong(*args, **kwargs):
        calls.append(real(*args, **kwargs))
        return calls[-1] if len(calls) == 1 else [{**calls[-1][0], "exact": False}]

    monkeypatch.setattr(quantized_beliefs, "evaluate_facts", with_the_coded_one_wrong)
    with pytest.raises(ValidationError, match="Nothing was changed"):
        quantize_belief(store, FACT.id, anything)
    assert calls[0][0]["exact"] and store.get(FACT.id).version == 1
    quantize_belief(store, FACT.id, anything, keep_answer=False)
    assert store.get(FACT.id).report["precision"]["bits"] == 2


def test_the_registry_follows_and_is_asked(store, llama, tokenizer):
    registry = Registry(store, angle_min=0.0, leakage_max=1e9, generic_max=1e9)
    registry.register(store.get(FACT.id).id, store.get(FACT.id).delta)
    registry.save()
    report = quantize_belief(store, FACT.id, 2, registry=registry)
    assert registry.ids == [store.get(FACT.id).id] and registry.strangers() == []
    assert report.angle is None  # nothing else is registered
    registry.register("other", own_deltas(llama, tokenizer)[0])
    with pytest.raises(QuantizationError, match="angle to other deltas"):
        quantize_belief(store, FACT.id, 2, registry=registry)
    registry.limits = type(registry.limits)(0.99, 1e9, 1e9, False)
    before = registry.ids, store.get(FACT.id).id
    with pytest.raises(InterferenceError):
        quantize_belief(store, FACT.id, 2, registry=registry, others=())
    assert (registry.ids, store.get(FACT.id).id) == before


def test_a_changed_file_is_found(store):
    quantize_belief(store, FACT.id, 2)
    path = file_of(store, FACT.id)
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError):
        _ = store.get(FACT.id).delta


def test_a_belief_without_a_fact_is_coded_without_measuring_answers(store, llama, tokenizer):
    store.add_delta("bare", joint_delta(llama, tokenizer))
    assert quantize_belief(store, "bare", 3).bits == 4
    assert json.loads(json.dumps(store.get("bare").report))["precision"]["tier"] == 3
