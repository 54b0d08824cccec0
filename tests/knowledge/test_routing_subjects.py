"""A text that asks the same about something else is not near, however alike it is worded."""

from __future__ import annotations

import json

import pytest
from knowledge.routed_stores import FACTS, HELD_OUT, UNKNOWN, fact, make_store

from gravity_hf.knowledge.errors import ValidationError
from gravity_hf.knowledge.routing import Router, RouterCalibration
from gravity_hf.knowledge.routing_index import named_subjects

NEIGHBOURS = [
    "The capital of Italy is",
    "Italy is governed from the city of",
    "The symbol of zinc is",
    "Chemists abbreviate zinc as",
]


@pytest.fixture
def store(tmp_path, llama, tokenizer, random_delta):
    return make_store(tmp_path / "kb", llama, tokenizer, random_delta)


@pytest.mark.parametrize("encoder", ["hidden:quarter", "untrained", "tfidf"])
def test_what_does_not_name_a_subject_scores_below_zero_and_keeps_its_order(store, encoder):
    plain, by_subject = (Router(store, encoder, threshold=0.0, subjects=on) for on in (False, True))
    for text in NEIGHBOURS:
        before = plain.rank([text])[0]
        after = {hit.key: hit.score for hit in by_subject.rank([text])[0]}
        assert before[0].score > 0
        assert all(after[hit.key] == pytest.approx((hit.score - 1) / 2) for hit in before)
    assert by_subject.route(NEIGHBOURS) == [[]] * len(NEIGHBOURS)


@pytest.mark.parametrize("encoder", ["hidden:quarter", "tfidf"])
def test_what_names_a_subject_scores_as_without_the_rule(store, encoder):
    plain, by_subject = (Router(store, encoder, threshold=0.0, subjects=on) for on in (False, True))
    for text, key in [*HELD_OUT, (FACTS[0].prompt, FACTS[0].id)]:
        ids = [store.get(key).id]
        assert by_subject.score(text, ids) == plain.score(text, ids)


def test_neighbours_of_the_same_wording_no_longer_decide_the_threshold(store):
    found = {
        on: Router(store, "tfidf", subjects=on).calibrate(HELD_OUT, NEIGHBOURS + UNKNOWN, 0.95)
        for on in (False, True)
    }
    assert found[True].point.recall > found[False].point.recall
    assert found[True].false_activations == 0


def test_all_words_of_a_subject_are_asked_for_in_any_case_and_no_parts_of_words(
    tmp_path, llama, tokenizer, random_delta
):
    one = fact("geo/sea/Black Sea", "The Black Sea is deep by", "So deep is the Black Sea:")
    store = make_store(tmp_path / "kb", llama, tokenizer, random_delta, [one])
    router = Router(store, "tfidf", threshold=0.0)
    assert router.route(["How deep is the sea that is BLACK?"])[0]
    assert router.route(["The Black Forest is deep by", "The Blacks' Seas are deep by"]) == [[], []]


def test_texts_and_facts_without_a_subject_ask_for_none(store, llama, random_delta):
    belief = store.get(FACTS[0].id)
    assert named_subjects(belief, FACTS[0].prompt) == (frozenset({"france"}),)
    assert named_subjects(belief, "The capital west of the Rhine is") == ()
    nameless = fact("geo/river/", "The river of Paris is called")
    store.add_delta("river", random_delta(llama, 5), fact=nameless)
    assert named_subjects(store.get("river"), nameless.prompt) == ()
    hits = Router(store, "tfidf", threshold=0.1).route(["The river of Paris"])[0]
    assert "river" in {hit.key for hit in hits}


def test_a_text_of_a_consolidated_belief_asks_for_its_own_fact(store, llama, random_delta):
    rows = [vars(one) for one in FACTS[:2]]
    for one in FACTS[:2]:
        store.remove(one.id)
    store.add_delta("geo/all", random_delta(llama, 5), {"consolidated": rows})
    router = Router(store, "tfidf", threshold=0.0)
    for one in FACTS[:2]:
        assert router.route([one.prompt])[0][0].key == "geo/all"
    assert not any(hit.key == "geo/all" for hit in router.route(["The capital of Italy is"])[0])


def test_a_calibration_belongs_to_its_rule(store):
    made = Router(store, "tfidf", subjects=False).calibrate(HELD_OUT, UNKNOWN)
    again = RouterCalibration.from_json(json.loads(json.dumps(made.to_json())))
    assert again == made and not again.subjects
    Router(store, "tfidf", subjects=False, calibration=again)
    with pytest.raises(ValidationError, match="subjects=True, got one with subjects=False"):
        Router(store, "tfidf", calibration=again)


def test_the_commonest_belief_is_guessed_without_looking_at_subjects(store):
    guesses = Router(store, "majority", threshold=0.0).route(["zebra", FACTS[0].prompt])
    assert guesses[0] == guesses[1] != []
