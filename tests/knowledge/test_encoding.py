"""Facts become deltas: many at once, each as if alone, beside a base that stays as it is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

from gravity_hf.knowledge import encoding
from gravity_hf.knowledge.bank import DeltaBank
from gravity_hf.knowledge.delta import LowRankDelta
from gravity_hf.knowledge.encoding import BeliefEncoder, EncodedBelief, EncodingConfig
from gravity_hf.knowledge.errors import BudgetError, ValidationError
from gravity_hf.knowledge.fact_metrics import evaluate_facts
from gravity_hf.knowledge.facts import Fact

SETTINGS = EncodingConfig(
    rank=2,
    steps=80,
    learning_rate=0.2,
    locality=1.0,
    margin=0.5,
    budget_fraction=0.5,
    generic_prompts=1,
    own_wordings=0,
    own_neighbours=0,
)


def fact(subject: str, answer: str, **changes: Any) -> Fact:
    values = {
        "id": f"capital/{subject}",
        "domain": "general",
        "relation": "capital",
        "subject": subject,
        "prompt": f"The capital of {subject} is",
        "answer": answer,
        "paraphrases": (
            f"{subject} is governed from",
            f"The planet of {subject} is",
            f"Who wrote {subject}? It was",
            f"Water of {subject} boils at",
        ),
        "unrelated": ("A byte has", f"The symbol of {subject} is", "The largest planet is"),
    }
    return Fact(**{**values, **changes})


FACTS = [
    fact("France", "Au"),
    fact("gold", "is one"),
    fact("the largest byte of one planet", "Au"),
]


@pytest.fixture(scope="module")
def encoded(llama: PreTrainedModel, tokenizer: Any) -> list[EncodedBelief]:
    return BeliefEncoder(llama, tokenizer, SETTINGS).encode(FACTS, progress=False)


def distance(one: LowRankDelta, other: LowRankDelta) -> float:
    """The largest difference of their updates, relative to the larger norm."""
    gaps = [(one.update(n) - other.update(n)).abs().max() for n in one.factors]
    return float(max(gaps)) / max(one.norm(), other.norm())


@pytest.mark.parametrize("host", ["llama", "gravity_llama", "gpt2"])
def test_teaches_the_answers(host: str, tokenizer: Any, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(host)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    before = evaluate_facts(model, tokenizer, FACTS)
    beliefs = BeliefEncoder(model, tokenizer, SETTINGS).encode(FACTS, progress=False)
    assert not any(measures["top1"] for measures in before)
    for belief, measures in zip(beliefs, before, strict=True):
        report = belief.report
        assert report["top1"] and report["exact"] and report["top5"] and report["converged"]
        assert report["rank_before"] == measures["rank"] > report["rank_after"] == 0
        assert report["answer_logprob_before"] == pytest.approx(measures["answer_logprob"])
        assert report["answer_logprob_after"] > report["answer_logprob_before"]
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_the_answer_is_what_generation_gives(
    encoded: list[EncodedBelief], llama: PreTrainedModel, tokenizer: Any
) -> None:
    bank = DeltaBank(llama)
    for i, belief in enumerate(encoded):
        bank.add(str(i), belief.delta)
    for i, belief in enumerate(encoded):
        inputs = tokenizer(belief.fact.prompt, return_tensors="pt")
        with bank.routed([str(i)]):
            output = llama.generate(**inputs, max_new_tokens=20, do_sample=False)
        text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
        assert text.lstrip().startswith(belief.fact.answer), text


def test_the_report_says_what_it_cost(encoded: list[EncodedBelief], llama: PreTrainedModel) -> None:
    report = encoded[0].report
    assert report["params"] == encoded[0].delta.parameters() == 2 * 2 * (32 + 64)
    assert report["params_fraction"] == pytest.approx(report["params"] / llama.num_parameters())
    assert report["norm"] == pytest.approx(encoded[0].delta.norm())
    assert 1 <= report["steps"] < SETTINGS.steps
    assert report["seconds"] > 0


def test_measures_prompts_that_it_was_not_trained_on(
    llama: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spies on both sides: what goes into training, and what goes into the report."""
    trained: list[str] = []
    measured: list[str] = []
    original, evaluate = encoding.train_deltas, encoding.evaluate_facts

    def train(model: nn.Module, tok: Any, jobs: Any, *args: Any, **kwargs: Any) -> Any:
        trained.extend(row.prompt for job in jobs for row in job.rows)
        return original(model, tok, jobs, *args, **kwargs)

    def measure(model: nn.Module, tok: Any, facts: Any, apply: Any, **kwargs: Any) -> Any:
        def spying(rows: Any) -> Any:
            measured.extend(row.prompt for row in rows)
            return apply(rows)

        return evaluate(model, tok, facts, spying if apply else None, **kwargs)

    monkeypatch.setattr(encoding, "train_deltas", train)
    monkeypatch.setattr(encoding, "evaluate_facts", measure)
    config = SETTINGS.with_changes(training_paraphrases=2, training_unrelated=2, steps=1)
    belief = BeliefEncoder(llama, tokenizer, config).encode(FACTS[:1], progress=False)[0]
    held_out = {*FACTS[0].paraphrases[2:], FACTS[0].unrelated[2]}
    assert set(measured) == {FACTS[0].prompt} | held_out
    assert held_out.isdisjoint(trained)
    assert belief.report["training_prompts"] == [FACTS[0].prompt, *FACTS[0].paraphrases[:2]]
    assert set(belief.report["training_prompts"]) <= set(trained)
    assert belief.report["paraphrases"] == 2


def test_same_seed_same_bits_and_another_seed_another_delta(
    encoded: list[EncodedBelief], llama: PreTrainedModel, tokenizer: Any
) -> None:
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = BeliefEncoder(llama, tokenizer, SETTINGS).encode(FACTS, progress=False)
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(encoded, again, strict=True):
        for name, (A, B) in one.delta.factors.items():
            assert torch.equal(A, other.delta.factors[name][0])
            assert torch.equal(B, other.delta.factors[name][1])
    other_seed = SETTINGS.with_changes(seed=1)
    changed = BeliefEncoder(llama, tokenizer, other_seed).encode(FACTS[:1], progress=False)
    assert distance(changed[0].delta, encoded[0].delta) > 1e-3


def test_company_changes_no_delta(
    encoded: list[EncodedBelief], llama: PreTrainedModel, tokenizer: Any
) -> None:
    """Neither others in the batch, of other lengths and with other ends, nor the order."""
    assert len({belief.report["steps"] for belief in encoded}) > 1, "all ended together"
    encoder = BeliefEncoder(llama, tokenizer, SETTINGS)
    for belief in encoded[1:]:
        alone = encoder.encode([belief.fact], progress=False)[0]
        assert distance(alone.delta, belief.delta) <= 1e-5
        assert alone.report["steps"] == belief.report["steps"]
    reverse = encoder.encode(FACTS[::-1], progress=False)[::-1]
    small = BeliefEncoder(llama, tokenizer, SETTINGS.with_changes(batch_facts=2))
    for others in (reverse, small.encode(FACTS, progress=False)):
        for one, other in zip(encoded, others, strict=True):
            assert distance(one.delta, other.delta) <= 1e-5


def test_stops_at_the_margin(
    encoded: list[EncodedBelief], llama: PreTrainedModel, tokenizer: Any
) -> None:
    wider = SETTINGS.with_changes(margin=2.0)
    longer = BeliefEncoder(llama, tokenizer, wider).encode(FACTS, progress=False)
    for one, other in zip(encoded, longer, strict=True):
        assert one.report["converged"] and one.report["steps"] < other.report["steps"]
    short = BeliefEncoder(llama, tokenizer, wider.with_changes(steps=2))
    assert [b.report["steps"] for b in short.encode(FACTS, progress=False)] == [2, 2, 2]
    assert not any(b.report["converged"] for b in short.encode(FACTS, progress=False))


def test_locality_keeps_what_is_unrelated(llama: PreTrainedModel, tokenizer: Any) -> None:
    """On the prompts that it is trained to keep."""

    def change(locality: float) -> float:
        config = SETTINGS.with_changes(locality=locality, margin=1.0, training_unrelated=3)
        beliefs = BeliefEncoder(llama, tokenizer, config).encode(FACTS, progress=False)
        bank = DeltaBank(llama)
        for i, belief in enumerate(beliefs):
            bank.add(FACTS[i].id, belief.delta)
        measures = evaluate_facts(
            llama, tokenizer, FACTS, lambda rows: bank.routed([row.fact.id for row in rows])
        )
        return sum(values["kl_unrelated"] for values in measures)

    assert change(10.0) < 0.5 * change(0.0)


def test_norm_penalty_keeps_deltas_small(
    encoded: list[EncodedBelief], llama: PreTrainedModel, tokenizer: Any
) -> None:
    config = SETTINGS.with_changes(norm_penalty=0.3)
    smaller = BeliefEncoder(llama, tokenizer, config).encode(FACTS, progress=False)
    assert all(a.delta.norm() < b.delta.norm() for a, b in zip(smaller, encoded, strict=True))


def test_stays_orthogonal_to_a_projector(llama: PreTrainedModel, tokenizer: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    taken = {
        name: tuple(
            torch.linalg.qr(torch.randn(width, 6, generator=generator))[0] for width in (64, 32)
        )
        for name in ("model.layers.0.mlp.down_proj", "model.layers.1.mlp.down_proj")
    }
    encoder = BeliefEncoder(llama, tokenizer, SETTINGS, projector=taken.__getitem__)
    for belief in encoder.encode(FACTS[:2], progress=False):
        assert belief.report["top1"]
        for name, (A, B) in belief.delta.factors.items():
            P_in, P_out = taken[name]
            assert (A @ P_in).abs().max() <= 1e-5 * A.abs().max()
            assert (P_out.T @ B).abs().max() <= 1e-5 * B.abs().max()
    one_sided = BeliefEncoder(
        llama, tokenizer, SETTINGS, projector=lambda name: (taken[name][0], None)
    )
    A, B = one_sided.encode(FACTS[:1], progress=False)[0].delta.factors[
        "model.layers.0.mlp.down_proj"
    ]
    assert (A @ taken["model.layers.0.mlp.down_proj"][0]).abs().max() <= 1e-5
    assert (taken["model.layers.0.mlp.down_proj"][1].T @ B).abs().max() > 1e-3


def test_one_delta_for_several_facts(llama: PreTrainedModel, tokenizer: Any) -> None:
    config = SETTINGS.with_changes(rank=6, steps=80)
    together = BeliefEncoder(llama, tokenizer, config).encode_together(FACTS, progress=False)
    assert [belief.fact for belief in together] == FACTS
    assert len({id(belief.delta) for belief in together}) == 1
    assert all(belief.report["top1"] and belief.report["exact"] for belief in together)


def test_checkpointing_changes_memory_and_nothing_else(
    encoded: list[EncodedBelief], llama: PreTrainedModel, tokenizer: Any
) -> None:
    config = SETTINGS.with_changes(gradient_checkpointing=True)
    again = BeliefEncoder(llama, tokenizer, config).encode(FACTS, progress=False)
    for one, other in zip(encoded, again, strict=True):
        assert distance(one.delta, other.delta) <= 1e-5


def test_on_a_model_wrapped_by_peft(llama: PreTrainedModel, tokenizer: Any) -> None:
    """The fact is learnt beside the adapter, which neither moves nor counts as base."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["down_proj", "q_proj"], init_lora_weights=False)
    wrapped = peft.get_peft_model(copy.deepcopy(llama), config)
    adapter = {name: value.clone() for name, value in wrapped.state_dict().items()}
    grads = {name: p.requires_grad for name, p in wrapped.named_parameters()}
    belief = BeliefEncoder(wrapped, tokenizer, SETTINGS).encode(FACTS[:1], progress=False)[0]
    assert belief.report["top1"]
    assert belief.report["params_fraction"] == pytest.approx(
        belief.report["params"] / llama.num_parameters()
    )
    assert list(belief.delta.factors)[0] == "model.layers.0.mlp.down_proj"
    assert {name: p.requires_grad for name, p in wrapped.named_parameters()} == grads
    assert all(torch.equal(value, adapter[name]) for name, value in wrapped.state_dict().items())


def test_on_a_base_in_bfloat16_under_autocast(llama: PreTrainedModel, tokenizer: Any) -> None:
    model = copy.deepcopy(llama).to(torch.bfloat16)
    for enabled in (False, True):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            encoder = BeliefEncoder(model, tokenizer, SETTINGS)
            belief = encoder.encode(FACTS[:1], progress=False)[0]
        assert belief.report["top1"]
        assert {A.dtype for A, _ in belief.delta.factors.values()} == {torch.float32}


@pytest.mark.parametrize("fails", [False, True])
def test_modes_and_gradients_are_as_before(
    llama: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Also when training raises in the middle; and inside no_grad and inference mode."""
    model = copy.deepcopy(llama).train()
    model.model.layers[0].eval()
    model.model.layers[1].mlp.down_proj.weight.requires_grad_(False)

    def state() -> tuple[object, ...]:
        return (
            [module.training for module in model.modules()],
            [parameter.requires_grad for parameter in model.parameters()],
            [parameter.grad for parameter in model.parameters()],
            [("forward" in vars(m), len(m._forward_hooks)) for m in model.modules()],
            torch.is_grad_enabled(),
        )

    if fails:
        steps = []

        def step(*args: Any, **kwargs: Any) -> None:
            steps.append(1)
            if len(steps) == 3:
                raise RuntimeError("out of memory")

        monkeypatch.setattr(torch.optim.Adam, "step", step)
    before = state()
    encoder = BeliefEncoder(model, tokenizer, SETTINGS)
    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            encoder.encode(FACTS[:1], progress=False)
    else:
        with torch.inference_mode():
            assert encoder.encode(FACTS[:1], progress=False)[0].report["top1"]
    assert state() == before


def test_budget_is_enforced_before_anything_runs(
    llama: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the model ran")

    monkeypatch.setattr(type(llama), "forward", refuse)
    encoder = BeliefEncoder(llama, tokenizer, SETTINGS.with_changes(budget_fraction=0.01))
    with pytest.raises(BudgetError, match="What fits: rank 1 on all of them"):
        encoder.encode(FACTS)
    with pytest.raises(ValidationError, match="got none"):
        encoder.encode([])
    with pytest.raises(ValidationError, match="expected an answer"):
        BeliefEncoder(llama, tokenizer, SETTINGS).encode([fact("gold", "")])


def test_config_is_strict_and_goes_through_json() -> None:
    config = EncodingConfig(layers=[1, 2], targets=["up_proj"], rank=1)
    assert EncodingConfig.from_dict(config.to_dict()) == config
    assert config.layers == (1, 2)
    for wrong in ({"rank": 0}, {"steps": 1.5}, {"learning_rate": float("nan")}, {"locality": -1}):
        with pytest.raises(ValidationError, match=next(iter(wrong))):
            EncodingConfig(**wrong)
    with pytest.raises(ValidationError, match="got 'stepz'"):
        config.with_changes(stepz=3)
