"""Provenance beside generation: nothing it does shows in the text; every row is its own."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from knowledge.routed_stores import FACTS, UNKNOWN, make_store

from gravity_hf.knowledge.abstention import OperatingPoint
from gravity_hf.knowledge.confidence import FEATURES, ConfidenceModel, ConfidenceQuality
from gravity_hf.knowledge.errors import ValidationError
from gravity_hf.knowledge.provenance import ProvenanceRecorder, provenance_of
from gravity_hf.knowledge.routing import Router

TEXTS = [FACTS[0].prompt, FACTS[2].paraphrases[1], UNKNOWN[0], FACTS[4].prompt]
NEW = 6


@pytest.fixture(scope="module")
def store(tmp_path_factory, llama, tokenizer, random_delta):
    return make_store(tmp_path_factory.mktemp("kb") / "kb", llama, tokenizer, random_delta)


@pytest.fixture(scope="module")
def bank(store):
    return store.compile_bank()


@pytest.fixture
def recorder(store, bank):
    # By wording alone, so that a text may have two sources.
    router = Router(store, "tfidf", top_k=2, threshold=0.25, subjects=False)
    return ProvenanceRecorder(store, bank, router, every=2)


def confidence(weight: float, threshold: float, beliefs=()) -> ConfidenceModel:
    """Of the best similarity alone: 1/2 where it is 1/2."""
    weights = [weight if name == "best_similarity" else 0.0 for name in FEATURES]
    point = OperatingPoint(threshold, True, 1.0, 1.0, 0.0, 1.0, 1, 1)
    return ConfidenceModel(
        names=FEATURES,
        mean=(0.5,) * len(FEATURES),
        scale=(1.0,) * len(FEATURES),
        weights=tuple(weights),
        intercept=0.0,
        point=point,
        quality=ConfidenceQuality(1.0, 0.0, 0.0, 1, 1),
        target=0.95,
        beliefs=tuple(beliefs),
    )


def generate(model, tokenizer, texts, **options):
    inputs = tokenizer(list(texts), return_tensors="pt", padding=True)
    settings = {"max_new_tokens": NEW, "do_sample": False, **options}
    return model.generate(
        **inputs, return_dict_in_generate=True, output_scores=True, output_logits=True, **settings
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "temperature": 1.5, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 2},
        {"num_beams": 3},
        {"repetition_penalty": 1.5},
        {"use_cache": False},
    ],
    ids=["greedy", "sampling", "two of each", "beams", "penalty", "no cache"],
)
def test_recording_changes_no_bit_of_the_generation(llama, tokenizer, recorder, options):
    outputs = []
    for recorded in (False, True):
        torch.manual_seed(7)
        with recorder.routed(TEXTS):
            processors = [recorder.processor()] if recorded else []
            outputs.append(
                generate(llama, tokenizer, TEXTS, logits_processor=processors, **options)
            )
    plain, watched = outputs
    assert torch.equal(plain.sequences, watched.sequences)
    for name in ("scores", "logits"):
        pairs = zip(getattr(plain, name), getattr(watched, name), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert any(result.per_token for result in recorder.results)


def test_the_processor_returns_the_very_scores(recorder, tokenizer):
    with recorder.routed(TEXTS[:1]):
        scores = torch.randn(1, 300)
        ids = tokenizer(TEXTS[:1], return_tensors="pt")["input_ids"]
        assert recorder.processor()(ids, scores) is scores


@pytest.mark.parametrize("sampling", [False, True], ids=["greedy", "sampling"])
def test_a_rows_provenance_is_the_same_alone_and_in_a_padded_batch(
    llama, tokenizer, recorder, sampling
):
    torch.manual_seed(3)
    with recorder.routed(TEXTS):
        out = generate(
            llama, tokenizer, TEXTS, do_sample=sampling, logits_processor=[recorder.processor()]
        )
    together = recorder.results
    width = out.sequences.shape[1] - NEW
    for row, text in enumerate(TEXTS):
        ids = tokenizer([text], return_tensors="pt")["input_ids"]
        assert ids.shape[1] < width or row == 1 or row == 2
        with recorder.routed([text]):
            processor = recorder.processor()
            for step in range(NEW):
                # What generate would show of the same text without the batch.
                seen = torch.cat([ids, out.sequences[row : row + 1, width : width + step]], 1)
                processor(seen, torch.zeros(1, 300))
        # To the last bit.
        assert recorder.result == together[row]


def test_sources_are_the_routed_beliefs_with_what_they_did(llama, tokenizer, store, recorder, bank):
    with recorder.routed(TEXTS):
        out = generate(llama, tokenizer, TEXTS, logits_processor=[recorder.processor()])
    hits = recorder.router.route(TEXTS)
    assert [len(x) for x in hits] == [2, 1, 0, 1]
    for row, (found, routed) in enumerate(zip(recorder.results, hits, strict=True)):
        assert [(x.key, x.score) for x in found.sources] == [tuple(hit) for hit in routed]
        for source in found.sources:
            belief = store.get(source.key)
            assert (source.id, source.version) == (belief.id, belief.version)
        if not routed:
            assert found.per_token == ()
            assert found.confidence == 0
            assert found.uncertain
            continue
        assert [effect.step for effect in found.per_token] == [0, 2, 4]
        # With all sources the likeliest token is what greedy decoding took.
        width = out.sequences.shape[1] - NEW
        taken = out.sequences[row, width:].tolist()
        assert [effect.token for effect in found.per_token] == taken[::2]
        first = found.per_token[0]
        assert {x.id: (x.kl, x.changes_token) for x in first.sources} == {
            x.id: (x.kl, x.changes_token) for x in found.sources
        }
        with torch.no_grad():
            ids = tokenizer([TEXTS[row]], return_tensors="pt")["input_ids"]
            base = llama(input_ids=ids).logits[0, -1].double().log_softmax(-1)
            with bank.routed([[x.id for x in found.sources]]):
                edited = llama(input_ids=ids).logits[0, -1].double().log_softmax(-1)
        assert first.kl == pytest.approx(float((edited.exp() * (edited - base)).sum()), rel=1e-3)
        assert first.token_without == int(base.argmax())


def test_several_sequences_of_a_prompt_share_its_sources(llama, tokenizer, recorder):
    torch.manual_seed(0)
    with recorder.routed(TEXTS[:2]):
        generate(
            llama,
            tokenizer,
            TEXTS[:2],
            do_sample=True,
            num_return_sequences=3,
            logits_processor=[recorder.processor()],
        )
    results = recorder.results
    assert [x.sources[0].key for x in results] == [FACTS[0].id] * 3 + [FACTS[2].id] * 3


def test_a_row_is_not_looked_at_after_its_end(llama, tokenizer, recorder):
    with recorder.routed(TEXTS[:1]):
        processor = recorder.processor()
        ids = tokenizer(TEXTS[:1], return_tensors="pt")["input_ids"]
        scores = torch.zeros(1, 300)
        # The prompt may hold the token that ends an answer.
        ids = torch.cat([torch.tensor([[tokenizer.eos_token_id]]), ids], 1)
        for token in (5, 6, tokenizer.eos_token_id, 0, 0):
            processor(ids, scores)
            ids = torch.cat([ids, torch.tensor([[token]])], 1)
    assert [effect.step for effect in recorder.result.per_token] == [0, 2]


def test_a_mask_tells_padding_from_a_prompt_that_begins_with_that_token(tokenizer, recorder):
    pad = tokenizer.pad_token_id
    prompt = [pad, *tokenizer(TEXTS[0])["input_ids"]]
    ids = torch.tensor([[pad, *prompt]])
    results = []
    for mask in (torch.tensor([[0] + [1] * len(prompt)]), None):
        with recorder.routed(TEXTS[:1]):
            recorder.processor(mask)(ids, torch.zeros(1, 300))
        results.append(recorder.result.per_token[0].kl)
    with recorder.routed(TEXTS[:1]):
        recorder.processor(torch.ones(1, len(prompt)))(ids[:, 1:], torch.zeros(1, 300))
    assert results[0] == recorder.result.per_token[0].kl != results[1]


def test_rows_of_low_confidence_stop_and_the_others_go_on(llama, tokenizer, store, bank, recorder):
    recorder.calibration = confidence(20.0, 0.9)
    with recorder.routed(TEXTS):
        free = generate(llama, tokenizer, TEXTS).sequences
    with recorder.routed(TEXTS):
        stop = recorder.abstain()
        out = generate(
            llama,
            tokenizer,
            TEXTS,
            logits_processor=[recorder.processor()],
            stopping_criteria=[stop],
        ).sequences
    confidences = [x.confidence for x in recorder.results]
    stopped = [x < 0.9 for x in confidences]
    assert (
        stopped
        == [x.abstained for x in recorder.results]
        == [x.uncertain for x in recorder.results]
    )
    assert any(stopped) and not all(stopped)
    # Without a source, whatever the model of the confidence makes of the rest.
    assert confidences[2] == 0
    width = free.shape[1] - NEW
    for row, has_stopped in enumerate(stopped):
        if has_stopped:
            assert out[row, width] == free[row, width]
            assert (out[row, width + 1 :] == tokenizer.pad_token_id).all()
            assert len(recorder.results[row].per_token) <= 1
        else:
            assert torch.equal(out[row], free[row])


def test_when_all_abstain_generation_ends(llama, tokenizer, recorder):
    with recorder.routed(TEXTS):
        out = generate(
            llama,
            tokenizer,
            TEXTS,
            logits_processor=[recorder.processor()],
            stopping_criteria=[recorder.abstain(below=1.0)],
        ).sequences
    width = tokenizer(TEXTS, padding=True, return_tensors="pt")["input_ids"].shape[1]
    assert out.shape[1] == width + 1


def test_confidence_is_calibrated_or_says_that_it_is_not(store, bank, recorder, tokenizer):
    ids = tokenizer(TEXTS[:1], return_tensors="pt")["input_ids"]
    found = []
    versions = list(Router(store, "tfidf").index.versions)
    for model in (None, confidence(3.0, 0.2, versions), confidence(3.0, 0.999, versions[1:])):
        recorder.calibration = model
        with recorder.routed(TEXTS[:1]):
            recorder.processor()(ids, torch.zeros(1, 300))
        found.append(recorder.result)
    plain, sure, unsure = found
    assert not plain.calibrated and not plain.stale
    shares = plain.components
    assert plain.confidence == pytest.approx(
        0.4 * shares["routing"] + 0.3 * shares["coherence"] + 0.3 * shares["coverage"]
    )
    assert sure.calibrated and not sure.stale and not sure.uncertain
    assert sure.confidence == pytest.approx(1 / (1 + 2.718281828459045**-1.5))
    assert unsure.uncertain and unsure.stale
    assert sure.features == plain.features
    assert set(sure.features) == set(FEATURES)


def test_beliefs_asked_for_by_name_need_no_router(store, bank, llama, tokenizer):
    recorder = ProvenanceRecorder(store, bank)
    named = [[store.get(FACTS[3].id).id], []]
    with recorder.routed(rows=named):
        generate(llama, tokenizer, TEXTS[:2], logits_processor=[recorder.processor()])
    first, second = recorder.results
    assert [(x.key, x.score) for x in first.sources] == [(FACTS[3].id, 1.0)]
    assert first.per_token[0].kl > 0
    assert second.sources == ()
    scored = ProvenanceRecorder(store, bank, Router(store, "tfidf", threshold=0.5))
    with scored.routed(TEXTS[:1], rows=[[store.get(x.id).id for x in FACTS[::-1]]]):
        scored.processor()(tokenizer(TEXTS[:1], return_tensors="pt")["input_ids"], torch.zeros(1))
    # Best first, whatever the order they were named in.
    sources = scored.result.sources
    assert [x.score for x in sources] == sorted((x.score for x in sources), reverse=True)
    assert (len(sources), sources[0].key) == (len(FACTS), FACTS[0].id)
    assert sources[0].score == pytest.approx(1.0)


def test_provenance_goes_into_json(llama, tokenizer, recorder):
    with recorder.routed(TEXTS):
        generate(llama, tokenizer, TEXTS, logits_processor=[recorder.processor()])
    values = json.loads(json.dumps([x.to_json() for x in recorder.results], allow_nan=False))
    assert values[0]["sources"][0]["key"] == FACTS[0].id
    assert values[0]["per_token"][0]["sources"][0]["kl"] > 0


def test_a_servers_own_loop_assembles_the_same(store, bank, llama, tokenizer, recorder):
    with recorder.routed(TEXTS[:1]):
        recorder.processor()(tokenizer(TEXTS[:1], return_tensors="pt")["input_ids"], torch.zeros(1))
    row = recorder._current().recording.rows[0]
    beliefs = {store.get(key).id: store.get(key) for key in store}
    plan = type(row.plan)(row.plan.ids, row.plan.scores, row.plan.nearest)
    versions = recorder.router.index.versions
    again = provenance_of(
        plan, row.effects, beliefs, bank, None, active=len(store), versions=versions
    )
    assert again == recorder.result


def test_threads_have_their_own_recordings(tokenizer, recorder):
    barrier = threading.Barrier(2, timeout=30)

    def run(text):
        with recorder.routed([text]):
            barrier.wait()
            ids = tokenizer([text], return_tensors="pt")["input_ids"]
            processor = recorder.processor()
            barrier.wait()
            processor(ids, torch.zeros(1, 300))
            barrier.wait()
            return recorder.result.sources[0].key

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, [FACTS[0].prompt, FACTS[4].prompt]))
    assert found == [FACTS[0].id, FACTS[4].id]


def test_a_generation_in_another_thread_is_refused_since_it_has_no_deltas(recorder, tokenizer):
    ids = tokenizer(TEXTS[:1], return_tensors="pt")["input_ids"]
    with recorder.routed(TEXTS[:1]), ThreadPoolExecutor(1) as pool:
        future = pool.submit(recorder.processor(), ids, torch.zeros(1, 300))
        with pytest.raises(ValidationError, match="thread that generates"):
            future.result()


def test_what_is_used_wrongly_says_how_to_use_it(store, bank, recorder, tokenizer):
    ids = tokenizer(TEXTS[:1], return_tensors="pt")["input_ids"]
    fresh = ProvenanceRecorder(store, bank, recorder.router)
    for use in (fresh.processor, fresh.abstain, lambda: fresh.results):
        with pytest.raises(ValidationError, match="routed|threshold"):
            use()
    with fresh.routed(TEXTS[:1]), pytest.raises(ValidationError, match="processor"):
        fresh.results  # noqa: B018
    with fresh.routed(TEXTS[:2]), pytest.raises(ValidationError, match="2 rows"):
        fresh.processor()(ids, torch.zeros(1))
    with fresh.routed(TEXTS[:1]):
        processor = fresh.processor()
        processor(ids, torch.zeros(1))
        with pytest.raises(ValidationError, match="once for each generate"):
            processor(ids[:, :-1], torch.zeros(1))
        with pytest.raises(ValidationError, match="once for each generate"):
            processor(ids.repeat(2, 1), torch.zeros(2))
    with fresh.routed(TEXTS[:1]), pytest.raises(ValidationError, match="left"):
        fresh.processor(torch.tensor([[1, 0]]))(ids[:, :2], torch.zeros(1))
    with (
        pytest.raises(ValidationError, match="router"),
        ProvenanceRecorder(store, bank).routed(TEXTS),
    ):
        pass
    with pytest.raises(ValidationError, match="active beliefs"), fresh.routed(rows=[["nobody"]]):
        pass
    with pytest.raises(ValidationError, match="as many rows"), fresh.routed(TEXTS, rows=[[]]):
        pass
    with pytest.raises(ValidationError, match="every"):
        ProvenanceRecorder(store, bank, every=-1)
