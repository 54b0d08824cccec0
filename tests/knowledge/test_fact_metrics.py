"""Measures of facts, against the same counted by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from gravity_hf.knowledge.bank import DeltaBank
from gravity_hf.knowledge.delta import LowRankDelta
from gravity_hf.knowledge.errors import ValidationError
from gravity_hf.knowledge.fact_metrics import evaluate_facts
from gravity_hf.knowledge.fact_tokens import answer_ids, prompt_ids
from gravity_hf.knowledge.facts import Fact


def fact(answer: str, *aliases: str, name: str = "one") -> Fact:
    return Fact(
        id=name,
        domain="d",
        relation="r",
        subject="gold",
        prompt="The symbol of gold is",
        answer=answer,
        aliases=aliases,
        paraphrases=("gold has", "Who wrote of gold? It was", "The largest gold is in the"),
        unrelated=("The capital of France is", "A byte", "Water boils"),
    )


@torch.no_grad()
def log_p(model: PreTrainedModel, ids: list[int]) -> Tensor:
    """One row without padding, `[T, vocabulary]`."""
    return model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)


def test_of_the_model_as_it_is(llama: PreTrainedModel, tokenizer: Any) -> None:
    facts = [fact("Paris"), fact("one hundred degrees", name="two")]
    for one, measures in zip(facts, evaluate_facts(llama, tokenizer, facts), strict=True):
        start = prompt_ids(tokenizer, one.prompt)
        answer = answer_ids(tokenizer, one.prompt, one.answer)
        steps = log_p(llama, start + answer)[len(start) - 1 : -1]
        own = steps[range(len(answer)), answer]
        assert measures["answer_logprob"] == pytest.approx(float(own.sum()), abs=1e-4)
        assert measures["rank"] == int((steps[0] > own[0]).sum())
        assert measures["top1"] == (measures["rank"] == 0)
        assert measures["top5"] == (measures["rank"] < 5)
        assert measures["id"] == one.id
        assert measures["paraphrases"] == 3
        assert measures["kl_unrelated"] is measures["unrelated_kept"] is None
        json.dumps(measures, allow_nan=False)


def test_exact_is_what_greedy_decoding_gives(
    llama: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model made to answer "Paris" in all its tokens, and then something else."""
    wanted = answer_ids(tokenizer, "The symbol of gold is", "Paris")
    other = answer_ids(tokenizer, "The symbol of gold is", "boils")

    def forward(input_ids: Tensor, attention_mask: Tensor, **kwargs: Any) -> Any:
        scores = torch.zeros(*input_ids.shape, 300)
        for row, ids in enumerate(input_ids.tolist()):
            for position in range(len(ids)):
                # After k of the wanted tokens, the next of them; else the first.
                for k in range(len(wanted), -1, -1):
                    if ids[position + 1 - k : position + 1] == wanted[:k]:
                        break
                following = wanted[k] if k < len(wanted) else other[0]
                scores[row, position, following] = 1.0
        return type("Output", (), {"logits": scores})

    monkeypatch.setattr(llama, "forward", forward)
    cases = {
        ("Paris",): (True, True),
        ("boils", "Paris"): (False, True),  # an alias counts as the answer, not as its first token
        ("boils",): (False, False),
    }
    for answers, (top1, exact) in cases.items():
        measures = evaluate_facts(llama, tokenizer, [fact(*answers)])[0]
        assert (measures["top1"], measures["exact"]) == (top1, exact)
        assert measures["paraphrase_exact"] == float(exact)
        assert measures["paraphrase_top1"] == float(top1)
    longer = evaluate_facts(llama, tokenizer, [fact("Paris gold")])[0]
    assert longer["top1"] and not longer["exact"]


def test_change_at_unrelated_prompts(
    llama: PreTrainedModel, tokenizer: Any, random_delta: Callable[..., LowRankDelta]
) -> None:
    one = fact("Paris")
    bank = DeltaBank(llama)
    bank.add("x", random_delta(llama, 3, scale=0.4))
    seen: list[tuple[str, str]] = []

    def apply(rows: Any) -> Any:
        seen.extend((row.kind, row.prompt) for row in rows)
        return bank.routed(["x"] * len(rows))

    measures = evaluate_facts(
        llama, tokenizer, [one], apply, trained_paraphrases=1, trained_unrelated=2
    )[0]
    ids = prompt_ids(tokenizer, one.unrelated[2])
    before = log_p(llama, ids)[-1]
    with bank.routed(["x"]):
        after = log_p(llama, ids)[-1]
    kl = float((before.exp() * (before - after)).sum())
    assert measures["kl_unrelated"] == pytest.approx(kl, rel=1e-3) and kl > 0.01
    assert measures["unrelated_kept"] == float(before.argmax() == after.argmax())
    assert measures["paraphrases"] == 2
    assert set(seen) == {
        ("prompt", one.prompt),
        ("paraphrase", one.paraphrases[1]),
        ("paraphrase", one.paraphrases[2]),
        ("unrelated", one.unrelated[2]),
    }
    unchanged = evaluate_facts(llama, tokenizer, [one], lambda rows: bank.unrouted())[0]
    assert unchanged["kl_unrelated"] == pytest.approx(0.0, abs=1e-6)
    assert unchanged["unrelated_kept"] == 1.0


def test_does_not_depend_on_batches(llama: PreTrainedModel, tokenizer: Any) -> None:
    facts = [fact("Paris"), fact("one hundred degrees", "Jupiter", name="two"), fact("eight")]
    whole = evaluate_facts(llama, tokenizer, facts)
    for size in (1, 3):
        for one, other in zip(
            whole, evaluate_facts(llama, tokenizer, facts, batch_rows=size), strict=True
        ):
            assert one.keys() == other.keys()
            for name, value in one.items():
                if name == "answer_logprob":
                    assert math.isclose(value, other[name], abs_tol=1e-3)
                else:
                    assert value == other[name], name


def test_nothing_held_out_is_none_and_ties_count_against_the_answer(
    llama: PreTrainedModel, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        llama,
        "forward",
        lambda input_ids, attention_mask: type(
            "Output", (), {"logits": torch.zeros(*input_ids.shape, 300)}
        ),
    )
    measures = evaluate_facts(llama, tokenizer, [fact("Paris")], trained_paraphrases=3)[0]
    assert measures["rank"] == 299 and not measures["top1"] and not measures["exact"]
    assert measures["paraphrase_top1"] is measures["paraphrase_exact"] is None


def test_modes_are_as_before_and_answers_that_cannot_be_written_are_refused(
    llama: PreTrainedModel, tokenizer: Any
) -> None:
    llama.train()
    try:
        evaluate_facts(llama, tokenizer, [fact("Paris")])
        assert llama.training and llama.model.layers[0].training
    finally:
        llama.eval()
    with pytest.raises(ValidationError, match="expected an answer"):
        evaluate_facts(llama, tokenizer, [fact("")])
    # An alias of this kind cannot be generated either: it is left out.
    assert evaluate_facts(llama, tokenizer, [fact("Paris", "")]) == evaluate_facts(
        llama, tokenizer, [fact("Paris")]
    )
