"""Few-shot sweeps: what is shown, what is not, and that both are what is measured."""

from __future__ import annotations

import json

import pytest
import torch
from knowledge.taught import CONFIG, facts

from gravity_hf.knowledge.bank import DeltaBank
from gravity_hf.knowledge.errors import ValidationError
from gravity_hf.knowledge.fact_metrics import evaluate_facts
from gravity_hf.knowledge.few_shot import METHODS, few_shot_sweep
from gravity_hf.knowledge.lora_control import lora_control

SETTINGS = CONFIG.with_changes(steps=40)


@pytest.fixture(scope="module")
def sweep(llama, tokenizer):
    return few_shot_sweep(
        llama, tokenizer, facts(6), counts=(1, 2), seeds=(0, 1), hidden=2, config=SETTINGS
    )


def test_every_method_count_and_seed_is_run(sweep):
    found = {(run.method, run.count, run.seed) for run in sweep.runs}
    assert found == {(m, n, s) for m in METHODS for n in (1, 2) for s in (0, 1)}
    assert {(s.method, s.count) for s in sweep.summaries} == {
        (m, n) for m in METHODS for n in (1, 2)
    }


def test_facts_that_are_measured_as_unseen_are_never_shown(sweep):
    for run in sweep.runs:
        assert len(run.shown) == run.count == len(run.memorised) == len(run.paraphrases)
        assert len(run.hidden) == 2 == len(run.unseen)
        assert not set(run.shown) & set(run.hidden)
    by_seed = {seed: {run.hidden for run in sweep.runs if run.seed == seed} for seed in (0, 1)}
    # The same ones for every method and count of a seed, others for another seed.
    assert all(len(found) == 1 for found in by_seed.values()) and by_seed[0] != by_seed[1]


def test_paraphrases_that_are_measured_are_never_trained_on(llama, tokenizer, monkeypatch):
    from gravity_hf.knowledge import few_shot

    asked = []
    monkeypatch.setattr(
        few_shot,
        "evaluate_facts",
        lambda *a, **k: asked.append(k) or evaluate_facts(*a, **k),
    )
    few_shot_sweep(
        llama,
        tokenizer,
        facts(2),
        counts=(1,),
        seeds=(0,),
        hidden=1,
        config=SETTINGS.with_changes(steps=1),
    )
    assert asked and all(k["trained_paraphrases"] == SETTINGS.training_paraphrases for k in asked)
    assert all(k["trained_unrelated"] == SETTINGS.training_unrelated for k in asked)


def test_what_was_trained_is_memorised_and_the_base_is_the_control(sweep):
    for count in (1, 2):
        assert sweep.of("named", count).memorised.rate == 1.0
        assert sweep.of("base", count).memorised.rate == 0.0
        assert sweep.of("base", count).kl_unrelated.highest == 0.0
        assert sweep.of("named", count).kl_unrelated.lowest > 0.0
    # Without a delta of its own an unseen fact is answered by the base.
    named = [run.unseen for run in sweep.runs if run.method == "named"]
    assert named == [run.unseen for run in sweep.runs if run.method == "base"]


def test_lora_has_as_many_parameters_as_all_deltas(sweep):
    for count in (1, 2):
        assert sweep.of("lora", count).parameters == sweep.of("named", count).parameters > 0
    assert sweep.of("together", 2).parameters < sweep.of("named", 2).parameters


def test_summaries_pool_the_seeds(sweep):
    summary = sweep.of("named", 2)
    own = [run for run in sweep.runs if (run.method, run.count) == ("named", 2)]
    assert summary.memorised.trials == 4 and summary.unseen.trials == 4
    assert summary.paraphrases.successes == sum(x > 0.5 for run in own for x in run.paraphrases)
    assert summary.seeds["paraphrases"].seeds == 2
    lora = [run for run in sweep.runs if (run.method, run.count) == ("lora", 2)]
    better = sum(
        a and not b
        for run, other in zip(own, lora, strict=True)
        for a, b in zip(run.memorised, other.memorised, strict=True)
    )
    assert summary.versus_lora.only_first == better
    assert sweep.of("lora", 2).versus_lora.p_value == 1.0


def test_the_fewest_facts_that_reach_a_share(sweep):
    assert sweep.fewest("named", "memorised", 0.3) == 1
    assert sweep.fewest("base", "memorised", 0.3) is None


def test_sweeps_go_into_json_and_repeat(llama, tokenizer, sweep):
    again = few_shot_sweep(
        llama, tokenizer, facts(6), counts=(1,), seeds=(0,), hidden=2, config=SETTINGS
    )
    for run in again.runs:
        same = next(x for x in sweep.runs if (x.method, x.count, x.seed) == (run.method, 1, 0))
        assert (run.memorised, run.paraphrases, run.unseen) == (
            same.memorised,
            same.paraphrases,
            same.unseen,
        )
    found = json.loads(json.dumps(sweep.to_dict()))
    assert found["summary"][0]["memorised"]["trials"] == 2 and found["config"]["hidden"] == 2
    assert found["summary"][0]["seeds"]["unseen"]["seeds"] == 2


@pytest.mark.parametrize(
    "change, match",
    [
        ({"counts": (5,)}, "at least 7 facts"),
        ({"counts": ()}, "counts"),
        ({"seeds": ()}, "seeds"),
        ({"hidden": 0}, "hidden"),
        ({"config": CONFIG.with_changes(training_paraphrases=4)}, "more than the 4"),
    ],
)
def test_sweeps_that_would_measure_nothing_are_refused(llama, tokenizer, change, match):
    settings = {"counts": (1,), "seeds": (0,), "hidden": 2, "config": SETTINGS}
    with pytest.raises(ValidationError, match=match):
        few_shot_sweep(llama, tokenizer, facts(6), **{**settings, **change})


def test_lora_learns_its_texts_and_leaves_the_base(llama, tokenizer):
    before = {name: x.clone() for name, x in llama.state_dict().items()}
    grads = [p.requires_grad for p in llama.parameters()]
    delta = lora_control(llama, tokenizer, facts(2), CONFIG.with_changes(steps=30)).delta
    bank = DeltaBank(llama)
    bank.add("lora", delta)
    old = evaluate_facts(llama, tokenizer, facts(2))
    new = evaluate_facts(llama, tokenizer, facts(2), lambda rows: bank.routed([["lora"]]))
    assert all(a["answer_logprob"] > b["answer_logprob"] + 1 for a, b in zip(new, old, strict=True))
    assert all(torch.equal(x, before[name]) for name, x in llama.state_dict().items())
    assert [p.requires_grad for p in llama.parameters()] == grads
    assert all(p.grad is None for p in llama.parameters())
    again = lora_control(llama, tokenizer, facts(2), CONFIG.with_changes(steps=30)).delta
    for name, pair in delta.factors.items():
        assert all(map(torch.equal, pair, again.factors[name]))
        assert pair[0].shape[0] == 2 * CONFIG.rank


def test_lora_has_the_rate_that_suits_it(llama, tokenizer):
    config, rates = CONFIG.with_changes(steps=10), (1e-9, 0.03, 1e-3)
    alone = {
        rate: lora_control(llama, tokenizer, facts(2), config, learning_rates=[rate])
        for rate in rates
    }
    best = lora_control(llama, tokenizer, facts(2), config, learning_rates=rates)
    assert best.learning_rate == 0.03 and best.loss == alone[0.03].loss
    assert best.loss < alone[1e-3].loss < alone[1e-9].loss
    for name, pair in best.delta.factors.items():
        assert all(map(torch.equal, pair, alone[0.03].delta.factors[name]))


def test_lora_of_nothing_is_refused(llama, tokenizer):
    with pytest.raises(ValidationError, match="at least one fact"):
        lora_control(llama, tokenizer, [])
    with pytest.raises(ValidationError, match="at least one learning rate"):
        lora_control(llama, tokenizer, facts(1), learning_rates=[])
