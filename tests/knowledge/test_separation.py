"""The separation benchmark: its prompts, its judge, and that failures count as failures."""

from __future__ import annotations

import json

import pytest
import torch
from knowledge.hooks import own_hooks
from knowledge.taught import facts, own_deltas

from gravity_hf.knowledge.errors import ValidationError
from gravity_hf.knowledge.facts import Fact
from gravity_hf.knowledge.routing import Router
from gravity_hf.knowledge.separation import separation_benchmark
from gravity_hf.knowledge.separation_prompts import (
    BOTH,
    CATEGORIES,
    REASONING,
    RETRIEVAL,
    SeparationPrompt,
    is_right,
    reasoning_prompts,
    separation_prompts,
)
from gravity_hf.knowledge.store import BeliefStore

FEW = {"max_new_tokens": 3, "batch_size": 8}


@pytest.fixture(scope="module")
def store(tmp_path_factory, llama, tokenizer):
    store = BeliefStore.create(tmp_path_factory.mktemp("separation") / "kb", llama, tokenizer)
    for fact, delta in zip(facts(), own_deltas(llama, tokenizer), strict=True):
        trained = {"training_prompts": [fact.prompt, fact.paraphrases[0]]}
        store.add_delta(fact.id, delta, None, fact, trained)
    return store


def some_prompts(count=3):
    prompts = separation_prompts(facts())
    return [x for name in CATEGORIES for x in [p for p in prompts if p.category == name][:count]]


def learned_prompts():
    """Prompts that the deltas were trained on: they give their answers."""
    return [SeparationPrompt(f.prompt, RETRIEVAL, f.answers, f) for f in facts()]


@pytest.fixture(scope="module")
def report(store):
    return separation_benchmark(store, Router(store, "tfidf", threshold=0.2), some_prompts(), **FEW)


def test_forty_reasoning_prompts_and_three_of_every_fact():
    prompts = separation_prompts(facts(6))
    assert len(reasoning_prompts()) == 40 and len(prompts) == 40 + 18
    assert len(separation_prompts(facts() + [other_fact(i) for i in range(5)])) >= 60
    assert len({x.text for x in prompts}) == len(prompts)
    counts = {name: sum(x.category == name for x in prompts) for name in CATEGORIES}
    assert counts == {RETRIEVAL: 6, BOTH: 12, REASONING: 40}


def other_fact(i):
    return Fact(
        f"x/{i}", "x", "r", f"s{i}", f"Thing {i} is", f"a{i}", (), (f"p{i}", f"q{i}", f"r{i}")
    )


def test_prompts_were_not_trained_on_and_do_not_give_their_answer_away():
    chosen = facts(6)
    trained = [text for fact in chosen for text in (fact.prompt, fact.paraphrases[3])]
    for prompt in separation_prompts(chosen, trained=trained):
        assert prompt.text not in trained and prompt.text == prompt.text.rstrip()
        if prompt.category == RETRIEVAL:
            assert prompt.text in prompt.fact.paraphrases[:3]
    for prompt in separation_prompts(chosen):
        if prompt.kind not in ("choice", "letter") and prompt.category != REASONING:
            assert not any(answer in prompt.text for answer in prompt.answers)
        if prompt.kind == "choice":
            offered = [f.answer for f in chosen if f" {f.answer} " in prompt.text]
            assert prompt.fact.answer in offered and len(offered) == 2


def test_choices_are_in_either_order():
    chosen = [x for x in separation_prompts(facts(6)) if x.kind == "choice"]
    first = [
        x.text.index(f"out of {x.fact.answer} ") if f"out of {x.fact.answer} " in x.text else -1
        for x in chosen
    ]
    assert any(i >= 0 for i in first) and any(i < 0 for i in first)


def test_facts_without_a_prompt_left_are_refused():
    fact = facts(2)
    with pytest.raises(ValidationError, match="not trained on"):
        separation_prompts(fact, trained=fact[0].paraphrases)
    with pytest.raises(ValidationError, match="two answers"):
        separation_prompts(fact[:1])


@pytest.mark.parametrize(
    "text, right",
    [
        (" Paris", True),
        ("Paris, which", True),
        (' "Paris" is', True),
        ("paris.", True),
        ("the city of light", True),
        ("Parisian", False),
        ("not Paris", False),
        ("", False),
    ],
)
def test_the_judge_reads_the_first_words(text, right):
    prompt = SeparationPrompt("The capital of France is", RETRIEVAL, ("Paris", "the city of light"))
    assert is_right(text, prompt) is right


def test_every_prompt_is_answered_in_four_ways(report, store):
    assert len(report.items) == 9 and set(report.categories) == set(CATEGORIES)
    for item in report.items:
        assert set(item.texts) == set(item.right) == {"base", "named", "all", "routed"}
    # Where nothing is needed by name, the text is that of the base.
    for item in report.items:
        if item.category == REASONING:
            assert item.key is None and item.texts["named"] == item.texts["base"]
        if not item.sources:
            assert item.texts["routed"] == item.texts["base"]


def test_texts_are_what_the_beliefs_make_of_them(store):
    router = Router(store, "tfidf", threshold=0.2, top_k=1)
    found = separation_benchmark(store, router, learned_prompts(), **FEW)
    summary = found.categories[RETRIEVAL]
    for item, fact in zip(found.items, facts(), strict=True):
        # A tiny model may go on within the word, which the judge does not let pass.
        assert item.texts["named"].lstrip().startswith(fact.answer)
        assert item.texts["routed"] == item.texts["named"]
        assert not item.texts["base"].lstrip().startswith(fact.answer)
    assert summary.right["named"].successes >= 1 and summary.right["base"].rate == 0.0
    assert summary.routing.rate == 1.0
    # Alone in a batch each is answered as with the others.
    alone = separation_benchmark(store, router, learned_prompts()[1:2], **FEW).items[0]
    assert alone.texts == found.items[1].texts


def test_a_fact_that_is_not_retrieved_counts_as_wrong(store):
    """A router that finds nothing: routing and confidence are wrong for every prompt that needs a
    fact, though the confidence says honestly that it has no source; and right where none is needed.
    """
    nothing = Router(store, "tfidf", threshold=2.0)
    found = separation_benchmark(store, nothing, some_prompts(), **FEW)
    for item in found.items:
        assert item.sources == () and item.uncertain
        assert item.routing_right == item.flag_right == (item.category == REASONING)
    assert found.routing.successes == found.flags.successes == 3
    assert found.categories[RETRIEVAL].activated.rate == 0.0
    assert found.categories[REASONING].unchanged.rate == 1.0


def test_a_router_that_always_finds_something_is_wrong_on_reasoning(store):
    always = Router(store, "tfidf", threshold=-1.0, top_k=1)
    found = separation_benchmark(store, always, some_prompts(), **FEW)
    for item in found.items:
        assert len(item.sources) == 1
        assert item.routing_right == (item.sources[0] == item.key)
        if item.category == REASONING:
            assert not item.routing_right


def test_summaries_count_the_items(report):
    for name, summary in report.categories.items():
        own = [x for x in report.items if x.category == name]
        assert summary.prompts == len(own) == summary.routing.trials
        assert summary.routing.successes == sum(x.routing_right for x in own)
        assert summary.right["routed"].successes == sum(x.right["routed"] for x in own)
        assert summary.confidence[0] <= summary.confidence[1] <= summary.confidence[2]
    found = json.loads(json.dumps(report.to_dict()))
    assert len(found["per_item"]) == 9
    assert found["categories"][BOTH]["routing"]["trials"] == 3


def test_default_prompts_are_of_the_stores_facts(store, monkeypatch):
    from gravity_hf.knowledge import separation

    monkeypatch.setattr(
        separation,
        "separation_prompts",
        lambda facts, **k: [
            SeparationPrompt(f.paraphrases[-1], RETRIEVAL, f.answers, f) for f in facts
        ],
    )
    found = separation_benchmark(store, Router(store, "tfidf", threshold=0.2), limit=2, **FEW)
    assert len(found.items) == 2 and {x.key for x in found.items} <= set(store.keys())


def test_prompts_about_unknown_facts_are_refused(store):
    stranger = SeparationPrompt("x", RETRIEVAL, ("y",), other_fact(0))
    with pytest.raises(ValidationError, match="facts of the store"):
        separation_benchmark(store, Router(store, "tfidf", threshold=0.2), [stranger])


def test_the_base_is_left_as_it_was(store, llama):
    before = {name: x.clone() for name, x in llama.state_dict().items()}
    separation_benchmark(store, Router(store, "tfidf", threshold=0.2), some_prompts(1), **FEW)
    assert all(torch.equal(x, before[name]) for name, x in llama.state_dict().items())
    assert own_hooks(llama) == 0
