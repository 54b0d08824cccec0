"""The recall tasks tell attention that mixes tokens from attention that does not."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import gravity_hf  # noqa: F401  registers LGT
from gravity_hf.models.ngt import NGTConfig, NGTForCausalLM
from gravity_hf.training.recall import (
    TASKS,
    AssociativeSettings,
    RecallSettings,
    associative_rows,
    change_before,
    first_tokens,
    previous_tokens,
    train_associative,
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


ONE_PAIR = AssociativeSettings(
    pairs=1, keys=4, values=4, steps=60, learning_rate=1e-2, warmup=5, interval=20
)


def new_ngt(**changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    shape = {
        "vocab_size": ONE_PAIR.vocabulary,
        "max_position_embeddings": ONE_PAIR.length,
        "hidden_size": 16,
        "coord_dim": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "dropout": 0.0,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model("ngt", **{**shape, **changes}))


def test_every_key_is_asked_for_the_value_that_stood_beside_it() -> None:
    settings = AssociativeSettings(pairs=3, keys=5, values=2)
    ids, targets = associative_rows(settings, 20, torch.Generator().manual_seed(0))
    assert ids.shape == targets.shape == (20, settings.length)
    for row, wanted in zip(ids.tolist(), targets.tolist(), strict=True):
        pairs = dict(zip(row[:6:2], row[1:6:2], strict=True))
        assert len(pairs) == 3 and max(pairs) < 5 <= min(pairs.values())
        asked = row[6::2]
        assert sorted(asked) == sorted(pairs)
        assert row[7::2] == wanted[6::2] == [pairs[key] for key in asked]
        assert set(wanted[:6] + wanted[7::2]) == {-100}
    assert any(row[:6:2] != row[6::2] for row in ids.tolist())


def test_an_ngt_learns_what_stood_beside_the_one_key() -> None:
    result = train_associative(new_ngt(), ONE_PAIR)
    assert result.accuracy == 1.0 and result.steps_to_recall in result.curve
    assert list(result.curve) == [20, 40, 60] and len(result.losses) == 60
    never = train_associative(new_ngt(), replace(ONE_PAIR, steps=1))
    assert never.steps_to_recall is None and list(never.curve) == [1]


RECALL = AssociativeSettings(steps=1500, learning_rate=1e-3)


def recall_of(preset: str, **changes: object) -> float:
    """Accuracy in the experiment's own task, sizes and steps."""
    sizes = {"vocab_size": RECALL.vocabulary, "max_position_embeddings": RECALL.length}
    shape = {"hidden_size": 64, "coord_dim": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    torch.manual_seed(0)
    given = {**sizes, **shape, "intermediate_size": 256, "dropout": 0.0, **changes}
    model = NGTForCausalLM(NGTConfig.from_preset(preset, **given))
    return train_associative(model, RECALL).accuracy


@pytest.mark.slow
def test_like_tokens_that_start_near_recall_what_the_published_design_cannot_look_up() -> None:
    """The queries of the published one know nothing of their own token: it guesses among values."""
    assert recall_of("v2") > 0.95
    assert recall_of("reference") < 0.6


def test_more_pairs_than_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="AssociativeSettings.pairs: expected 1 to 4, .* got 5"):
        train_associative(new_ngt(), replace(ONE_PAIR, pairs=5))
    with pytest.raises(ValueError, match="max_position_embeddings of at least 8, got 4"):
        train_associative(new_ngt(), replace(ONE_PAIR, pairs=2))
