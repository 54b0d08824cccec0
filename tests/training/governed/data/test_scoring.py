"""Each sample has the loss that it has alone, however it is batched."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

from gravity_hf.training.governed.data import Tier, TierSettings, sample_losses, score_samples
from gravity_hf.training.tokenizers import byte_tokenizer

WORDS = 32


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=WORDS,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        attention_dropout=0.5,
    )
    return LlamaForCausalLM(config)


@pytest.fixture(scope="module")
def rows() -> list[dict[str, list[int]]]:
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 20, (13,), generator=draw).tolist()
    return [{"input_ids": torch.randint(WORDS, (n,), generator=draw).tolist()} for n in lengths]


def alone(model: LlamaForCausalLM, ids: list[int], labels: list[int] | None = None) -> float:
    model.eval()
    with torch.no_grad():
        row = torch.tensor([ids])
        return float(model(row, labels=row if labels is None else torch.tensor([labels])).loss)


@pytest.mark.parametrize("batch_size", [1, 4, 32])
def test_losses_are_those_of_samples_alone(model, rows, batch_size: int) -> None:
    scored = score_samples(model, rows, batch_size=batch_size)
    expected = [alone(model, row["input_ids"]) for row in rows]
    assert [row["loss"] for row in scored] == pytest.approx(expected, abs=1e-5)
    assert [row["n_tokens"] for row in scored] == [len(row["input_ids"]) - 1 for row in rows]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_ignored_labels_count_nothing(model, rows, side: str) -> None:
    ids = rows[0]["input_ids"]
    labels = [-100, -100, *ids[2:]]
    pad, ignored = [0] * 4, [-100] * 4
    padded = {
        "input_ids": pad + ids if side == "left" else ids + pad,
        "attention_mask": [0] * 4 + [1] * len(ids) if side == "left" else [1] * len(ids) + [0] * 4,
        "labels": ignored + labels if side == "left" else labels + ignored,
    }
    (row,) = score_samples(model, [padded])
    assert row["loss"] == pytest.approx(alone(model, ids, labels), abs=1e-5)
    assert row["n_tokens"] == len(ids) - 2


def test_a_dataset_gets_three_columns(model, rows) -> None:
    dataset = Dataset.from_list(rows)
    scored = score_samples(model, dataset)
    assert scored.column_names == ["input_ids", "loss", "tier", "n_tokens"]
    assert scored["loss"][:] == [row["loss"] for row in score_samples(model, rows)]
    with pytest.raises(ValueError, match="remove_columns"):
        score_samples(model, scored)


def test_text_is_tokenized(model) -> None:
    tokenizer = byte_tokenizer()
    texts = [{"text": "\t\n\r"}, {"text": "\x01\x02\x03\x04\x05"}]
    scored = score_samples(model, texts, tokenizer=tokenizer, max_length=4)
    assert [row["n_tokens"] for row in scored] == [2, 3]
    assert scored[0]["loss"] == pytest.approx(alone(model, list(b"\t\n\r")), abs=1e-5)


def test_the_model_is_left_as_it_was(model, rows) -> None:
    model.train()
    model.model.norm.eval()
    before = torch.get_rng_state()
    first = score_samples(model, rows)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and not model.model.norm.training
    # No dropout: the same again.
    assert score_samples(model, rows) == first
    model.train()


def test_losses_come_in_the_order_that_was_asked_for(model, rows) -> None:
    every = sample_losses(model, rows, range(len(rows)))
    some = sample_losses(model, rows, [7, 2, 7], batch_size=2)
    assert some.losses == pytest.approx(every.losses[[7, 2, 7]], abs=1e-6)
    assert some.tokens.tolist() == every.tokens[[7, 2, 7]].tolist()


def test_a_sample_that_predicts_nothing_has_no_tier(model) -> None:
    (row,) = score_samples(model, [{"input_ids": [3]}])
    assert math.isnan(row["loss"]) and row["tier"] == Tier.UNKNOWN and row["n_tokens"] == 0


@pytest.mark.parametrize("sample", [{"ids": [1]}, [1, 2], {"text": "x"}])
def test_what_is_no_sample_is_refused(model, sample: object) -> None:
    with pytest.raises(ValueError, match="sample 0"):
        score_samples(model, [sample])


def test_tiers_begin_where_the_settings_say() -> None:
    losses = np.array([0.05, 0.1, 0.99, 1.0, 3.9, 4.0, 7.9, 8.0, 20.0, 20.1, np.nan])
    assert TierSettings().tiers(losses).tolist() == [-2, 0, 0, 1, 1, 2, 2, 3, 3, -2, -1]
    kept = TierSettings(quality_floor=None, quality_ceiling=None)
    assert kept.tiers(losses)[[0, 9]].tolist() == [0, 3]


@pytest.mark.parametrize(
    "wrong",
    [{"learning": 9.0}, {"fractions": (1, 1)}, {"fractions": (0, 0, 0, 0)}, {"quality_floor": -1}],
)
def test_settings_that_cannot_work_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        TierSettings(**wrong)
