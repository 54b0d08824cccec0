"""Training from scratch: fair comparisons, honest records, runs that can be stopped."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from transformers import TrainingArguments

from gravity_hf.integration.hosts import gravity_modules
from gravity_hf.training.measures import mean_loss
from gravity_hf.training.pretraining import (
    PretrainArguments,
    new_model,
    pretrain,
    start_under_gravity,
    write_record,
)
from gravity_hf.training.streams import ConsecutiveWindows, RandomWindows, make_stream

SIZES = (
    "hidden_size=32,intermediate_size=48,num_hidden_layers=2,num_attention_heads=4,"
    "num_key_value_heads=2,tie_word_embeddings=true"
)
TEXT = "".join(f"{i} falls to {i * i % 97}; " for i in range(3000))


@pytest.fixture(scope="module")
def stream():
    return make_stream("byte", TEXT[:-4000], TEXT[-4000:])


def arguments(**changes):
    return PretrainArguments(
        **{"overrides": SIZES, "length": 32, "validation_windows": 20, **changes}
    )


def training(folder, **changes):
    values = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "logging_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    return TrainingArguments(str(folder), **{**values, **changes})


def test_two_attentions_see_the_same_batches_from_the_same_weights(tmp_path, stream, monkeypatch):
    seen = {}

    def spy(self, indices):
        batch = original(self, indices)
        if type(self) is RandomWindows:
            seen.setdefault(attention, []).append(batch)
        return batch

    original = RandomWindows.__getitems__
    monkeypatch.setattr(RandomWindows, "__getitems__", spy)
    for attention in ("dot_product", "gravity"):
        pretrain(arguments(attention=attention), training(tmp_path / attention, seed=3), stream)
    # Gravity reads its first windows once more, before training, to calibrate.
    plain, gravity = seen["dot_product"], seen["gravity"][-len(seen["dot_product"]) :]
    assert len(plain) == 8
    assert all(torch.equal(a, b) for a, b in zip(plain, gravity, strict=True))
    models = [new_model(arguments(), 256, seed=3) for _ in range(2)]
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("law", ["force", "power"])
def test_a_new_model_under_gravity_starts_with_spread_attention_not_uniform(stream, law):
    """Gravity-2's constants leave a new model's heads uniform; the closed form does not."""
    windows = RandomWindows(stream.train, 64, 32, 0)
    batch = {"input_ids": windows.__getitems__(list(range(4)))}
    plain = new_model(arguments(), 256, seed=0).eval()
    # Larger weights, so that attention is far from uniform at the start.
    with torch.no_grad():
        for layer in plain.model.layers:
            layer.self_attn.q_proj.weight.mul_(20)
            layer.self_attn.k_proj.weight.mul_(20)
    gravity = copy.deepcopy(plain)
    with torch.no_grad():
        expected = plain(**batch).logits
        start_under_gravity(gravity, arguments(law=law, distance="lifted", softness=16.0), windows)
        close = (gravity(**batch).logits - expected).abs().max()
        for module in gravity_modules(gravity).values():
            module.mass_log.fill_(-20.0)  # masses of 0: uniform attention
        uniform = (gravity(**batch).logits - expected).abs().max()
    assert close < 0.1 * uniform


def test_the_record_holds_the_losses_that_a_reader_can_measure_again(tmp_path, stream):
    result = pretrain(arguments(), training(tmp_path, eval_strategy="steps", eval_steps=4), stream)
    record = result.record
    windows = ConsecutiveWindows(stream.validation, 20, 32)
    again = mean_loss(result.model, [windows.__getitems__(list(range(20)))])
    assert record["loss"] == pytest.approx(again, abs=1e-5)
    assert set(record["evaluations"]) == {4, 8}
    assert record["best_loss"] == min(record["evaluations"].values())
    assert record["tokens"] == 8 * 4 * 32
    assert record["attention"]["summary"]["heads"] == 8
    assert record["text"]["digest"] == stream.digest
    file = write_record(record, tmp_path)
    assert json.loads(file.read_text())["loss"] == record["loss"]


def test_training_under_gravity_moves_masses_and_softenings(tmp_path, stream):
    windows = RandomWindows(stream.train, 32, 32, 0)
    start = new_model(arguments(), 256, seed=0)
    start_under_gravity(start, arguments(), windows)
    trained = pretrain(arguments(), training(tmp_path, seed=0), stream).model
    before, after = gravity_modules(start), gravity_modules(trained)
    for name in before:
        assert not torch.equal(before[name].mass_log, after[name].mass_log)
        assert not torch.equal(before[name].softening_log, after[name].softening_log)


def test_a_run_that_was_stopped_ends_as_one_that_was_not(tmp_path, stream):
    whole = pretrain(arguments(), training(tmp_path / "whole"), stream)
    keep = {"save_strategy": "steps", "save_steps": 4}
    pretrain(arguments(), training(tmp_path / "cut", **keep), stream)
    # As if killed while the last checkpoint was being written.
    (tmp_path / "cut" / "checkpoint-8" / "trainer_state.json").write_text("{")
    resumed = pretrain(arguments(), training(tmp_path / "cut", **keep), stream)
    assert resumed.record["loss"] == whole.record["loss"]
    assert resumed.record["training_losses"] == whole.record["training_losses"]
    for (name, a), b in zip(
        whole.model.named_parameters(), resumed.model.parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def test_checkpoints_of_another_run_are_not_taken_for_this_one(tmp_path, stream):
    keep = {"save_strategy": "steps", "save_steps": 4}
    pretrain(arguments(), training(tmp_path, **keep), stream)
    with pytest.raises(ValueError, match="checkpoints of a run with other settings"):
        pretrain(arguments(law="force"), training(tmp_path, **keep), stream)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"architecture": "perceptron"}, "expected a model_type of this library"),
        ({"overrides": "depth=3"}, r"got \['depth'\], which it does not have"),
        ({"overrides": "hidden_size"}, "expected name=value"),
    ],
)
def test_what_cannot_be_built_is_said_before_any_work(changes, message):
    with pytest.raises(ValueError, match=message):
        new_model(arguments(**changes), 256, seed=0)


def test_an_unknown_attention_is_refused():
    with pytest.raises(ValueError, match="--attention: expected one of"):
        arguments(attention="dot")


def test_overrides_are_read_from_json_too(stream):
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 32}
    model = new_model(
        arguments(architecture="gpt2", overrides=json.dumps(sizes)), stream.vocabulary, seed=0
    )
    assert model.config.n_embd == 16 and model.config.vocab_size == 256
