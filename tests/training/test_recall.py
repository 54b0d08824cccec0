"""The recall tasks tell attention that mixes tokens from attention that does not."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import gravity_hf  # noqa: F401  registers LGT
from gravity_hf.training.recall import (
    TASKS,
    RecallSettings,
    change_before,
    first_tokens,
    previous_tokens,
    train_recall,
)

SETTINGS = RecallSettings(length=8, vocabulary=8, steps=130, rows=32, evaluation_rows=64)


def new_lgt(**changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {
        "vocab_size": SETTINGS.vocabulary,
        "max_position_embeddings": SETTINGS.length,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "dropout": 0.0,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("lgt", **shape, **changes))


def test_answers_are_the_previous_and_the_first_token() -> None:
    ids = torch.tensor([[5, 6, 7], [1, 2, 3]])
    assert previous_tokens(ids).tolist() == [[5, 5, 6], [1, 1, 2]]
    assert first_tokens(ids).tolist() == [[5, 5, 5], [1, 1, 1]]


@pytest.mark.parametrize("task", TASKS)
def test_lgt_at_its_defaults_recalls(task: str) -> None:
    assert train_recall(new_lgt(), task, SETTINGS).accuracy >= 0.99


def test_the_published_law_stays_at_chance() -> None:
    """Made causal and nothing else, it sees no token but the one itself."""
    result = train_recall(new_lgt(softening=0.0), "previous", SETTINGS)
    assert result.accuracy == pytest.approx(SETTINGS.chance, abs=0.03)


def test_a_later_token_never_changes_an_earlier_logit() -> None:
    model = new_lgt()
    ids = torch.randint(0, SETTINGS.vocabulary, (4, SETTINGS.length))
    for place in range(1, SETTINGS.length):
        before, after = change_before(model, ids, place)
        assert before == 0.0 < after
    backwards = new_lgt(is_causal=False)
    assert change_before(backwards, ids, 4)[0] > 0.0


def test_the_same_seed_gives_the_same_training() -> None:
    short = RecallSettings(length=8, vocabulary=8, steps=3, rows=4, evaluation_rows=4)
    one, same, other = (train_recall(new_lgt(), "first", short, seed=s) for s in (1, 1, 2))
    assert one == same and one.losses != other.losses and len(one.losses) == 3


def test_what_cannot_be_trained_is_refused() -> None:
    model = new_lgt()
    with pytest.raises(ValueError, match="expected a task of"):
        train_recall(model, "last", SETTINGS)
    with pytest.raises(ValueError, match="vocab_size of at least 32, got 8"):
        train_recall(model, "first", RecallSettings(length=8))
    with pytest.raises(ValueError, match="max_position_embeddings of at least 32, got 8"):
        train_recall(model, "first", RecallSettings(vocabulary=8))
