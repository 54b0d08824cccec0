"""Routing: one decision a text, by fact, following the store; thresholds for a precision."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from knowledge.routed_stores import FACTS, HELD_OUT, UNKNOWN, fact, make_store

from gravity_hf.knowledge.errors import ValidationError
from gravity_hf.knowledge.routing import Hit, Router, RouterCalibration
from gravity_hf.knowledge.routing_index import category, indexed_texts

ENCODERS = ["hidden:quarter", "hidden:last", "untrained", "untrained:mid", "tfidf", "majority"]


@pytest.fixture
def store(tmp_path, llama, tokenizer, random_delta):
    return make_store(tmp_path / "kb", llama, tokenizer, random_delta)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_route_depends_on_its_text_alone_and_is_the_same_every_time(store, encoder):
    texts = [HELD_OUT[0][0], HELD_OUT[4][0], UNKNOWN[0], "", "gold " * 30]
    router = Router(store, encoder, threshold=-1.0)
    together = router.route(texts)
    backwards = router.route(texts[::-1])[::-1]
    alone = [router.route([text])[0] for text in texts]
    # Hits are compared with their scores, to the last bit.
    assert together == alone == backwards
    assert Router(store, encoder, threshold=-1.0).route(texts) == together


@pytest.mark.parametrize("encoder", ["hidden:0", "tfidf"])
def test_the_prompt_of_a_fact_finds_that_fact(store, encoder):
    router = Router(store, encoder, threshold=-1.0)
    for one in FACTS:
        best = router.route([one.prompt])[0][0]
        assert (best.key, best.score) == (one.id, pytest.approx(1.0))


def test_a_belief_scores_by_the_best_of_its_texts(store):
    router = Router(store, "tfidf", threshold=-1.0)
    assert router.route([FACTS[0].paraphrases[0]])[0][0] == Hit(FACTS[0].id, pytest.approx(1.0))
    # The other paraphrases are held out.
    assert router.route([FACTS[0].paraphrases[1]])[0][0].score < 0.99


def test_what_reaches_the_threshold_is_routed_and_no_more_than_top_k(store):
    text = "The capital of France is"
    every = Router(store, "tfidf", top_k=9, threshold=-1.0).route([text])[0]
    assert [hit.key for hit in every] == [hit.key for hit in sorted(every, key=lambda h: -h.score)]
    assert len(every) == len(FACTS)
    second = every[1].score
    assert every[2].score < second
    assert Router(store, "tfidf", top_k=9, threshold=second).route([text])[0] == every[:2]
    assert Router(store, "tfidf", top_k=1, threshold=second).route([text])[0] == every[:1]
    assert Router(store, "tfidf", threshold=1.5).route([text]) == [[]]


def test_equal_scores_are_in_the_order_of_their_keys(store):
    hits = Router(store, "tfidf", threshold=-1.0).route(["zebra"])[0]
    assert [hit.key for hit in hits] == sorted(one.id for one in FACTS)


def test_rows_are_the_ids_of_the_routes_for_a_bank(store, llama, tokenizer):
    router = Router(store, "tfidf", threshold=0.3)
    texts = ["The capital of France is", "zebra"]
    rows = router.rows(texts)
    assert rows == [[store.get(hit.key).id for hit in hits] for hits in router.route(texts)]
    assert rows[0] and not rows[1]
    inputs = tokenizer(texts, return_tensors="pt", padding=True)
    with torch.no_grad():
        base = llama(**inputs).logits
        with store.compile_bank().routed(rows):
            routed = llama(**inputs).logits
    assert not torch.equal(routed[0], base[0])
    assert torch.equal(routed[1], base[1])


@pytest.mark.parametrize("encoder", ENCODERS)
def test_removed_beliefs_are_never_routed_and_new_ones_at_once(store, encoder, llama, random_delta):
    router = Router(store, encoder, top_k=99, threshold=-1.0)
    text = FACTS[2].prompt
    found = {hit.key for hit in router.route([text])[0]}
    assert found == {one.id for one in FACTS}
    removed = store.get(FACTS[2].id).id
    store.remove(FACTS[2].id)
    assert {hit.key for hit in router.route([text])[0]} == found - {FACTS[2].id}
    assert removed not in router.rows([text])[0]
    new = fact("geo/capital/italy", "The capital of Italy is", "Italy is governed from")
    store.add_delta(new.id, random_delta(llama, 9), fact=new)
    assert new.id in {hit.key for hit in router.route([text])[0]}
    store.rollback(FACTS[2].id, 1)
    back = store.get(FACTS[2].id).id
    assert back != removed
    assert back in router.rows([text])[0]


def test_the_router_with_a_history_routes_as_a_new_one(store, llama, random_delta):
    router = Router(store, "hidden:mid", threshold=-1.0)
    router.route(["gold"])
    store.remove(FACTS[0].id)
    store.update_delta(FACTS[1].id, random_delta(llama, 7), fact=FACTS[1])
    assert router.route(UNKNOWN) == Router(store, "hidden:mid", threshold=-1.0).route(UNKNOWN)


def test_known_texts_are_not_embedded_again(store):
    calls = []

    def encoder(texts):
        calls.extend(texts)
        generator = [torch.Generator().manual_seed(sum(text.encode())) for text in texts]
        return torch.stack([torch.randn(8, generator=g) for g in generator])

    router = Router(store, encoder, threshold=-1.0)
    router.route(["a"])
    count = len(calls)
    assert len(set(calls)) == count
    store.remove(FACTS[0].id)
    router.route(["b"])
    assert calls[count:] == ["b"]


def test_only_versions_that_are_new_are_read(store, llama, random_delta):
    read = []

    def texts_of(belief):
        read.append((belief.key, belief.version))
        return indexed_texts(belief)

    router = Router(store, "tfidf", threshold=-1.0, texts_of=texts_of)
    router.route(["a"])
    assert len(read) == len(FACTS)
    store.remove(FACTS[0].id)
    store.update_delta(FACTS[1].id, random_delta(llama, 7), fact=FACTS[1])
    router.route(["a"])
    assert read[len(FACTS) :] == [(FACTS[1].id, 2)]


def test_an_encoder_may_be_a_callable_or_have_encode(store):
    class SentenceModel(torch.nn.Module):
        def encode(self, texts):
            return torch.stack([torch.tensor([len(x), x.count("a"), 1.0]) for x in texts]).numpy()

    model = SentenceModel()
    one, other = Router(store, model, threshold=-1.0), Router(store, model.encode, threshold=-1.0)
    assert one.route(UNKNOWN) == other.route(UNKNOWN)
    assert one.encoder == "SentenceModel"


def test_one_belief_is_found_and_an_empty_store_routes_nothing(
    tmp_path, llama, tokenizer, random_delta
):
    for encoder in ("hidden:0", "tfidf", "majority"):
        name = encoder.replace(":", "-")
        store = make_store(tmp_path / name, llama, tokenizer, random_delta, FACTS[:1])
        router = Router(store, encoder, threshold=0.5)
        assert [hit.key for hit in router.route([FACTS[0].prompt])[0]] == [FACTS[0].id]
        store.remove(FACTS[0].id)
        assert router.route([FACTS[0].prompt]) == [[]]
        assert router.rows(["a", "b"]) == [[], []]


def test_beliefs_without_texts_are_known_but_never_found(store, llama, random_delta):
    belief = store.add_delta("made/by/hand", random_delta(llama, 5))
    router = Router(store, "tfidf", top_k=99, threshold=-1.0)
    assert "made/by/hand" not in {hit.key for hit in router.route(["made by hand"])[0]}
    assert router.score("made by hand", [belief.id]) == [0.0]
    assert f"{belief.id}-v1" in router.index.versions


def test_indexed_are_the_trained_prompts(store, llama, random_delta):
    assert indexed_texts(store.get(FACTS[0].id)) == [FACTS[0].prompt, FACTS[0].paraphrases[0]]
    trained = [FACTS[3].prompt, FACTS[3].paraphrases[2], FACTS[3].prompt]
    store.update_delta(
        FACTS[3].id,
        random_delta(llama, 5),
        fact=FACTS[3],
        report={"training_prompts": trained},
    )
    assert indexed_texts(store.get(FACTS[3].id)) == trained[:2]
    assert category(store.get(FACTS[3].id)) == "chemistry/symbol"


def test_a_consolidated_belief_is_found_by_all_of_its_facts(store, llama, random_delta):
    rows = [vars(one) for one in FACTS[:2]]
    store.remove(FACTS[0].id)
    store.remove(FACTS[1].id)
    store.add_delta("geo/all", random_delta(llama, 5), {"consolidated": rows})
    router = Router(store, "tfidf", threshold=-1.0)
    for one in FACTS[:2]:
        assert router.route([one.prompt])[0][0].key == "geo/all"
    assert category(store.get("geo/all")) == "geo/capital"


def test_calibration_keeps_the_target_precision_on_its_queries(store):
    router = Router(store, "tfidf")
    for precision in (0.5, 0.8, 1.0):
        found = router.calibrate(HELD_OUT, UNKNOWN, precision)
        kept = [
            (hits[0].key == key)
            for hits, key in zip(
                router.route([text for text, _ in HELD_OUT] + UNKNOWN),
                [key for _, key in HELD_OUT] + [None] * len(UNKNOWN),
                strict=True,
            )
            if hits
        ]
        assert sum(kept) / len(kept) >= precision
        assert found.point.precision == sum(kept) / len(kept)
        assert found.point.kept == len(kept)
        assert found.false_activations == sum(bool(x) for x in router.route(UNKNOWN))


def test_calibration_is_the_lowest_threshold_that_keeps_the_precision(store):
    router = Router(store, "hidden:0")
    point = router.calibrate(HELD_OUT, UNKNOWN, 0.9).point
    best = [hits[0] for hits in router.rank([text for text, _ in HELD_OUT] + UNKNOWN)]
    right = [hit.key == key for hit, (_, key) in zip(best, HELD_OUT, strict=False)]
    right += [False] * len(UNKNOWN)
    lower = {hit.score for hit in best if hit.score < point.threshold}
    assert lower
    for level in lower:
        kept = [ok for hit, ok in zip(best, right, strict=True) if hit.score >= level]
        assert sum(kept) / len(kept) < 0.9


def test_a_precision_out_of_reach_routes_nothing_and_says_so(store):
    router = Router(store, "majority")
    found = router.calibrate([HELD_OUT[0]], UNKNOWN, 0.95)
    assert not found.point.reached
    assert found.point.kept == 0
    assert router.route([text for text, _ in HELD_OUT]) == [[]] * len(HELD_OUT)


def test_a_calibration_survives_json_and_belongs_to_its_encoder(store, tmp_path):
    router = Router(store, "tfidf")
    made = router.calibrate(HELD_OUT, UNKNOWN)
    file = tmp_path / "calibration.json"
    file.write_text(json.dumps(made.to_json(), allow_nan=False))
    assert RouterCalibration.load(file) == made
    again = Router(store, "tfidf", calibration=RouterCalibration.load(file))
    assert again.route(UNKNOWN) == router.route(UNKNOWN)
    with pytest.raises(ValidationError, match="tfidf"):
        Router(store, "hidden:mid", calibration=made)
    nothing = Router(store, "majority").calibrate([HELD_OUT[0]], UNKNOWN)
    text = json.dumps(nothing.to_json(), allow_nan=False)
    assert RouterCalibration.from_json(json.loads(text)).point.kept == 0
    for wrong in ({}, {"format": "gravity-router/1"}, made.to_json() | {"more": 1}):
        with pytest.raises(ValidationError, match="router calibration"):
            RouterCalibration.from_json(wrong)


def test_a_calibration_grows_stale_when_a_tenth_of_the_store_changed(
    tmp_path, llama, tokenizer, random_delta
):
    facts = [fact(f"a/b/{i}", f"Number {i} is", f"The {i}th is") for i in range(20)]
    store = make_store(tmp_path / "kb", llama, tokenizer, random_delta, facts)
    router = Router(store, "tfidf")
    assert not router.stale
    router.calibrate([("Number 3 is", "a/b/3")], UNKNOWN)
    store.remove("a/b/1")
    store.update_delta("a/b/2", random_delta(llama, 3), fact=facts[2])
    assert not router.stale
    store.remove("a/b/4")
    assert router.stale
    router.calibrate([("Number 3 is", "a/b/3")], UNKNOWN)
    assert not router.stale


def test_routing_while_the_store_changes_never_mixes_two_revisions(store, llama, random_delta):
    router = Router(store, "tfidf", top_k=99, threshold=-1.0)
    allowed = {one.id for one in FACTS}
    stop = threading.Event()

    def ask():
        while not stop.is_set():
            for decision in router.decide(["gold", "iron"]):
                keys = {hit.key for hit in decision.hits}
                assert keys in (allowed, allowed - {FACTS[0].id})
                assert len(decision.ids) == len(keys)

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask) for _ in range(3)]
        for _ in range(5):
            store.remove(FACTS[0].id)
            store.add_delta(FACTS[0].id, random_delta(llama, 0), fact=FACTS[0])
        stop.set()
        for future in asking:
            future.result()


@pytest.mark.parametrize("change", ["removed", "added"])
def test_what_changes_while_the_index_is_built_is_in_it(
    store, monkeypatch, change, llama, random_delta
):
    router = Router(store, "tfidf", top_k=99, threshold=-1.0)
    get, done = store.get, []
    new = fact("zoo/animal/zebra", "A zebra is a kind of", "Zebras are")

    def slow_get(key):
        if not done:
            done.append(key)
            if change == "removed":
                store.remove(FACTS[0].id)
            else:
                store.add_delta(new.id, random_delta(llama, 8), fact=new)
        return get(key)

    monkeypatch.setattr(store, "get", slow_get)
    found = {hit.key for hit in router.route(["gold"])[0]}
    all_keys = {one.id for one in FACTS}
    assert found == (all_keys - {FACTS[0].id} if change == "removed" else all_keys | {new.id})


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda s: Router(s, "word2vec"), "tfidf, majority"),
        (lambda s: Router(s, "hidden:99"), "from 0 to"),
        (lambda s: Router(s, "tfidf", top_k=0), "top_k"),
        (lambda s: Router(s, "tfidf", threshold="high"), "threshold"),
        (lambda s: Router(s, "tfidf").route(["a"]), "calibrate"),
        (lambda s: Router(s, "tfidf", threshold=0.1).route("a"), "list of texts"),
        (lambda s: Router(s, "tfidf").calibrate([("a", "nobody")], []), "nobody"),
        (lambda s: Router(s, "tfidf").calibrate([], ["a"]), "got none"),
        (lambda s: Router(s, lambda x: torch.full((1, 2), torch.nan)).rank(["a"]), "finite"),
    ],
    ids=["name", "layer", "top_k", "word", "uncalibrated", "text", "key", "empty", "nan"],
)
def test_what_is_wrong_is_refused_and_named(store, call, match):
    with pytest.raises(ValidationError, match=match):
        call(store)
