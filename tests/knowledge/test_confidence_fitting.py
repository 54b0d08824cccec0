"""A confidence model from a store's own queries, answered by the tiny model."""

from __future__ import annotations

import copy

import pytest
import torch
from knowledge.routed_stores import FACTS, HELD_OUT, UNKNOWN, fact, make_store

from gravity_hf.knowledge.confidence import FEATURES
from gravity_hf.knowledge.confidence_fitting import confidence_cases, fit_confidence
from gravity_hf.knowledge.errors import UnknownKeyError, ValidationError
from gravity_hf.knowledge.fact_tokens import prompt_ids
from gravity_hf.knowledge.provenance import ProvenanceRecorder
from gravity_hf.knowledge.routing import Router


def _greedy(store, text, ids, new):
    tokens = prompt_ids(store.tokenizer, text)
    end, start = store.tokenizer.eos_token_id, len(tokens)
    with torch.no_grad(), store.compile_bank().routed([ids]):
        while len(tokens) < start + new and tokens[-1] != end:
            logits = store.model(input_ids=torch.tensor([tokens])).logits
            tokens.append(int(logits[0, -1].argmax()))
    return store.tokenizer.decode(tokens[start:], skip_special_tokens=True)


@pytest.fixture(scope="module")
def store(tmp_path_factory, llama, tokenizer, random_delta):
    """Of two facts what the model with their delta says is the answer; of the others it is not."""
    folder = tmp_path_factory.mktemp("kb")
    drafts = make_store(folder / "drafts", llama, tokenizer, random_delta)
    facts = []
    for number, one in enumerate(FACTS):
        answer = "never that"
        if number in (0, 2):
            answer = _greedy(drafts, one.paraphrases[1], [drafts.get(one.id).id], 3).strip()
        facts.append(fact(one.id, one.prompt, *one.paraphrases, answer=answer))
    return make_store(folder / "kb", llama, tokenizer, random_delta, facts)


@pytest.fixture(scope="module")
def recorder(store):
    return ProvenanceRecorder(store, None, Router(store, "tfidf", top_k=1, threshold=0.2))


@pytest.fixture(scope="module")
def cases(recorder):
    return confidence_cases(recorder, HELD_OUT, UNKNOWN, max_new_tokens=3, batch_size=4)


def test_answers_are_those_of_the_routed_beliefs_and_judged_by_the_facts(cases, store, recorder):
    assert [(x.text, x.key) for x in cases] == HELD_OUT + [(text, None) for text in UNKNOWN]
    for case in cases:
        ids = [store.get(key).id for key in case.sources]
        assert case.answer == _greedy(store, case.text, ids, 3)
        expected = case.key is not None and store.get(case.key).fact.accepts(case.answer)
        assert case.right == expected
        assert set(case.features) == set(FEATURES)
    right = {case.text for case in cases if case.right}
    assert {FACTS[0].paraphrases[1], FACTS[2].paraphrases[1]} <= right
    assert len(right) < len(cases)
    routes = recorder.router.route([case.text for case in cases])
    assert [x.sources for x in cases] == [tuple(hit.key for hit in hits) for hits in routes]


@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
def test_cases_do_not_depend_on_the_batch(cases, recorder, store, monkeypatch, pad):
    # Padding with the token that ends answers, as many models do, has to be masked by us.
    twin = copy.deepcopy(store.tokenizer)
    twin.pad_token = pad
    monkeypatch.setattr(store, "tokenizer", twin)
    for size in (1, 3):
        found = confidence_cases(recorder, HELD_OUT[:3], [], max_new_tokens=3, batch_size=size)
        assert found == cases[:3]


def test_the_model_is_fitted_to_cases_with_sources_and_knows_the_store(cases, recorder, store):
    model = fit_confidence(recorder, cases)
    used = [case for case in cases if case.sources]
    assert model.quality.cases == len(used) < len(cases)
    assert model.quality.right == sum(case.right for case in used)
    assert model.beliefs == recorder.router.index.versions
    assert not model.is_stale(recorder.router.index.versions)
    with pytest.raises(ValidationError, match="threshold"):
        fit_confidence(recorder, [case for case in cases if not case.sources])


def test_a_query_about_an_unknown_key_is_refused_before_anything_runs(recorder):
    with pytest.raises(UnknownKeyError):
        confidence_cases(recorder, [("a", "nobody")], [])
