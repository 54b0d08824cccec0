"""What a delta changes at prompts that are not its own, in the model's next token."""

from __future__ import annotations

import pytest
import torch
from knowledge.hooks import own_hooks

from gravity_hf.knowledge.facts import Fact
from gravity_hf.knowledge.output_leakage import output_leakage, output_leakage_table

FACTS = [
    Fact(f"f/{i}", "f", "r", s, f"The symbol of {s} is", "Au", (), (f"Tell me about {s}:",), ())
    for i, s in enumerate(("gold", "France", "water"))
]


def next_tokens(model, tokenizer, prompt: str) -> torch.Tensor:
    with torch.no_grad():
        return model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1].double()


def test_equals_the_divergence_of_the_models_with_and_without(
    llama, tokenizer, random_delta
) -> None:
    delta = random_delta(llama, 0, rank=2, layers="all")
    found = output_leakage(llama, tokenizer, delta, FACTS)
    prompts = [prompt for fact in FACTS for prompt in fact.prompts]
    before = [next_tokens(llama, tokenizer, prompt).log_softmax(-1) for prompt in prompts]
    weights = {name: llama.get_submodule(name).weight for name in delta.factors}
    kept = {name: weight.detach().clone() for name, weight in weights.items()}
    try:
        with torch.no_grad():
            for name, weight in weights.items():
                weight += delta.update(name)
        after = [next_tokens(llama, tokenizer, prompt).log_softmax(-1) for prompt in prompts]
    finally:
        with torch.no_grad():
            for name, weight in weights.items():
                weight.copy_(kept[name])
    pairs = list(zip(before, after, strict=True))
    kl = [float((b.exp() * (b - a)).sum()) for b, a in pairs]
    assert found.prompts == 6
    assert found.kl == pytest.approx(sum(kl) / 6, rel=1e-3) and found.kl > 1e-3
    assert found.kl_max == pytest.approx(max(kl), rel=1e-3)
    assert found.kept == pytest.approx(sum(b.argmax() == a.argmax() for b, a in pairs) / 6)


def test_delta_of_zero_changes_nothing(llama, tokenizer, random_delta) -> None:
    zero = random_delta(llama, 0, layers="all").scaled(0.0)
    assert output_leakage(llama, tokenizer, zero, FACTS)[:3] == (0.0, 0.0, 1.0)


def test_beside_the_deltas_own_it_is_that_which_is_disturbed(
    llama, tokenizer, random_delta
) -> None:
    delta, own = (random_delta(llama, i, rank=2, layers="all") for i in range(2))
    alone = output_leakage(llama, tokenizer, delta, FACTS)
    beside = output_leakage(llama, tokenizer, delta, FACTS, own=own)
    assert alone.kl != beside.kl
    zero = delta.scaled(0.0)
    assert output_leakage(llama, tokenizer, zero, FACTS, own=own).kl < 1e-12


def test_no_others_no_leakage(llama, tokenizer, random_delta) -> None:
    found = output_leakage(llama, tokenizer, random_delta(llama, 0), [])
    assert found == (0.0, 0.0, 1.0, 0)


def test_table_has_every_delta_against_all_facts(llama, tokenizer, random_delta) -> None:
    deltas = {key: random_delta(llama, i, layers="all") for i, key in enumerate("ab")}
    facts = {"a": FACTS[:1], "b": FACTS[1:2], "c": FACTS[2:]}
    table = output_leakage_table(llama, tokenizer, deltas, facts)
    assert {a: list(row) for a, row in table.items()} == {
        "a": ["a", "b", "c"],
        "b": ["a", "b", "c"],
    }
    assert table["b"]["c"] == output_leakage(llama, tokenizer, deltas["b"], FACTS[2:])
    assert own_hooks(llama) == 0
