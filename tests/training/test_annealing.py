"""Annealing: slopes stay, the loss is held, the state survives, the model tells its softness."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hosts import tiny_host, tiny_inputs
from transformers import TrainingArguments

from gravity_hf import (
    GravityConfig,
    GravityTrainer,
    calibrate,
    gravity_lora,
    load_gravity_adapter,
    load_gravity_model,
    patch_with_gravity,
)
from gravity_hf.integration.hosts import gravity_modules, settings_of
from gravity_hf.training.annealing import SofteningAnnealing


class Examples(torch.utils.data.Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, index):
        ids = tiny_inputs("qwen2", batch=1, seed=index)["input_ids"][0]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def calibrated(softness=1.0, **settings):
    model = patch_with_gravity(tiny_host("qwen2"), GravityConfig(**settings))
    report = calibrate(model, [tiny_inputs("qwen2")], softness=softness, progress=False)
    return model, report


def train(model, callback, folder, *, resume=None, **options):
    arguments = {
        "max_steps": 8, "per_device_train_batch_size": 2, "learning_rate": 0.0, "use_cpu": True,
        "report_to": [], "logging_steps": 1, "disable_tqdm": True, "save_strategy": "no", **options,
    }  # fmt: skip
    trainer = GravityTrainer(
        model=model, args=TrainingArguments(folder, **arguments), train_dataset=Examples(),
        callbacks=[callback],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def softenings(model):
    return torch.cat([m().softening.detach() for m in gravity_modules(model).values()])


def loss_of(model):
    inputs = tiny_inputs("qwen2", batch=8)
    with torch.no_grad():
        return model.eval()(**inputs, labels=inputs["input_ids"]).loss.item()


@pytest.mark.parametrize("law", ["force", "power"])
def test_the_slope_at_the_typical_distance_stays(law, tmp_path):
    model, report = calibrated(law=law)

    def slopes():
        rows = iter(report.rows)
        for module in gravity_modules(model).values():
            terms = module()
            for mass, softening in zip(terms.mass.tolist(), terms.softening.tolist(), strict=True):
                reach = next(rows)["mean_distance"] + softening
                yield mass**2 / (reach**2 if law == "force" else reach)

    before, start = list(slopes()), softenings(model)
    train(model, SofteningAnnealing(4, 0.25, distances=report, tolerance=9.0), tmp_path)
    assert list(slopes()) == pytest.approx(before, rel=1e-5)
    torch.testing.assert_close(softenings(model), 0.25 * start)


@pytest.mark.parametrize("law", ["force", "power"])
def test_halving_the_softness_hardly_moves_the_loss(law, tmp_path):
    model, _ = calibrated(law=law)
    before = loss_of(model)
    train(model, SofteningAnnealing(4, 0.5, tolerance=9.0), tmp_path)
    moved = abs(loss_of(model) - before)
    # The same softenings under the old masses: what the rescaling of the masses is for.
    naive, _ = calibrated(law=law)
    with torch.no_grad():
        for name, module in gravity_modules(naive).items():
            module.softening_log.copy_(model.get_submodule(name).gravity.softening_log)
    assert moved < 0.01 and moved < 0.2 * abs(loss_of(naive) - before)


@pytest.mark.parametrize("law", ["force", "power"])
def test_distances_are_recovered_from_the_closed_form(law, tmp_path):
    model, report = calibrated(law=law)
    callback = SofteningAnnealing(4, 0.5)
    train(model, callback, tmp_path, max_steps=1)
    recovered = [value for values in callback.typical.values() for value in values]
    assert recovered == pytest.approx([row["mean_distance"] for row in report.rows], rel=1e-3)


def test_heads_that_share_a_mass_share_the_mean_factor(tmp_path):
    model, report = calibrated(mass_per="kv_head")
    masses = {n: m().mass.detach() for n, m in gravity_modules(model).items()}
    train(model, SofteningAnnealing(1, 0.5, distances=report, tolerance=9.0), tmp_path, max_steps=3)
    for name, module in gravity_modules(model).items():
        rows = [row for row in report.rows if row["layer"] == name]
        factors = torch.tensor([
            (r["mean_distance"] + 0.5 * r["softening"]) / (r["mean_distance"] + r["softening"])
            for r in rows
        ])  # fmt: skip
        expected = masses[name] * factors.view(2, 3).mean(-1).repeat_interleave(3)
        torch.testing.assert_close(module().mass.detach(), expected)


def test_it_waits_while_the_loss_is_above_the_tolerance(tmp_path):
    model, _ = calibrated()
    start = softenings(model)
    callback = SofteningAnnealing(4, 0.5, reference=0.0, tolerance=0.01)
    train(model, callback, tmp_path, learning_rate=1e-3)
    assert callback.taken == 0 and all(entry["paused"] for entry in callback.history)
    torch.testing.assert_close(softenings(model), start)
    assert settings_of(model).softness == 1.0


def test_it_goes_on_once_the_loss_is_back():
    model, _ = calibrated()
    callback = SofteningAnnealing(10, 0.5, tolerance=0.1, smoothing=0.0)
    arguments, state = TrainingArguments("unused", use_cpu=True), _state()
    callback.on_train_begin(arguments, state, None, model=model)
    taken = []
    for loss in (1.0, 1.05, 1.2, 1.2, 1.0, math.nan, 1.0):
        callback.on_step_end(arguments, state, None, model=model)
        callback.on_log(arguments, state, None, logs={"loss": loss})
        callback.on_log(arguments, state, None, logs={"eval_loss": 99.0})
        taken.append(callback.taken)
    assert taken == [0, 1, 2, 2, 2, 3, 3]


def _state():
    from transformers.trainer_callback import TrainerState

    return TrainerState()


def test_the_schedule_is_geometric_and_training_cannot_soften_against_it(tmp_path):
    model, _ = calibrated()
    start = softenings(model)
    callback = SofteningAnnealing(4, softness=0.25, tolerance=9.0)
    train(model, callback, tmp_path, learning_rate=1e-2, max_steps=7)
    fractions = [entry["fraction"] for entry in callback.history]
    assert fractions == pytest.approx([0.25 ** (i / 4) for i in (0, 1, 2, 3, 4, 4, 4)])
    assert callback.finished
    torch.testing.assert_close(softenings(model), 0.25 * start)
    assert [e["softness"] for e in callback.history] == pytest.approx(fractions)


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_run_equals_an_uninterrupted_one(restore, tmp_path):
    options = {
        "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 3,
        "restore_callback_states_from_checkpoint": restore,
    }  # fmt: skip
    whole, _ = calibrated()
    callback = SofteningAnnealing(6, 0.25, tolerance=0.05, smoothing=0.5)
    trainer = train(whole, callback, tmp_path / "whole", **options)
    again, _ = calibrated()
    fresh = SofteningAnnealing(6, 0.25, tolerance=0.05, smoothing=0.5)
    resumed = train(
        again, fresh, tmp_path / "again", resume=str(tmp_path / "whole" / "checkpoint-3"), **options
    )
    for name, value in whole.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert settings_of(again) == settings_of(whole)
    states = [
        next(c for c in t.callback_handler.callbacks if isinstance(c, SofteningAnnealing)).state()
        for t in (trainer, resumed)
    ]
    assert states[0] == states[1] and callback.taken > 0
    assert json.loads(json.dumps(states[0])) == states[0]


def test_checkpoints_and_saved_models_state_the_softness_in_force(tmp_path):
    model, _ = calibrated(softness=2.0)
    callback = SofteningAnnealing(4, 0.25, tolerance=9.0)
    train(model, callback, tmp_path, save_strategy="steps", save_steps=3)
    halfway = load_gravity_model(tmp_path / "checkpoint-3")
    assert settings_of(halfway).softness == pytest.approx(2.0 * 0.25 ** (2 / 4))
    model.save_pretrained(tmp_path / "end")
    assert settings_of(load_gravity_model(tmp_path / "end")).softness == pytest.approx(0.5)
    assert {m.config.softness for m in gravity_modules(model).values()} == {0.5}


def test_a_kl_budget_is_no_longer_claimed_once_the_softness_was_lowered(tmp_path):
    model = patch_with_gravity(tiny_host("qwen2"))
    calibrate(model, [tiny_inputs("qwen2")], max_kl=1e-3)
    assert settings_of(model).max_kl == 1e-3 and settings_of(model).softness > 0
    train(model, SofteningAnnealing(2, 0.5, tolerance=9.0), tmp_path)
    assert settings_of(model).max_kl is None
    assert {m.config.max_kl for m in gravity_modules(model).values()} == {None}


def test_under_lora_the_adapter_states_the_softness_and_its_own_masses_move(tmp_path):
    model = gravity_lora(calibrated()[0], r=2)
    start = softenings(model)
    train(model, SofteningAnnealing(4, 0.5, tolerance=9.0), tmp_path / "run", learning_rate=1e-3)
    model.save_pretrained(tmp_path / "adapter")
    loaded = load_gravity_adapter(tiny_host("qwen2"), tmp_path / "adapter")
    assert settings_of(loaded.get_base_model()).softness == 0.5
    torch.testing.assert_close(softenings(loaded), 0.5 * start)


def test_annealing_may_begin_in_the_middle_of_a_run(tmp_path):
    """A checkpoint from before the annealing has no state for it."""
    model, _ = calibrated()
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8}
    arguments = TrainingArguments(
        tmp_path, use_cpu=True, report_to=[], disable_tqdm=True, save_steps=2, max_steps=2,
        logging_steps=1, per_device_train_batch_size=2,
    )  # fmt: skip
    GravityTrainer(model=model, args=arguments, train_dataset=Examples()).train()
    callback = SofteningAnnealing(4, 0.5, tolerance=9.0)
    train(model, callback, tmp_path, resume=str(tmp_path / "checkpoint-2"), **options)
    assert callback.finished and settings_of(model).softness == 0.5


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"steps": 0, "fraction": 0.5}, "steps: expected at least 1"),
        ({"steps": 4}, "exactly one of them"),
        ({"steps": 4, "fraction": 0.5, "softness": 0.5}, "exactly one of them"),
        ({"steps": 4, "fraction": 2.0}, r"fraction: expected a number in \(0, 1\]"),
        ({"steps": 4, "softness": -1.0}, "softness: expected a finite number > 0"),
        ({"steps": 4, "fraction": 0.5, "tolerance": -1.0}, "tolerance"),
        ({"steps": 4, "fraction": 0.5, "smoothing": 1.0}, "smoothing"),
    ],
)
def test_settings_out_of_range_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        SofteningAnnealing(**arguments)


def test_what_cannot_be_annealed_is_refused_before_training(tmp_path):
    bare = patch_with_gravity(tiny_host("qwen2"))
    with pytest.raises(RuntimeError, match="softenings of their own"):
        train(bare, SofteningAnnealing(4, 0.5), tmp_path)
    with pytest.raises(RuntimeError, match="calibrated with a larger one, got 1.0"):
        train(calibrated()[0], SofteningAnnealing(4, softness=2.0), tmp_path)
    with pytest.raises(RuntimeError, match="logging_strategy='no'"):
        train(calibrated()[0], SofteningAnnealing(4, 0.5), tmp_path, logging_strategy="no")
    with pytest.raises(RuntimeError, match="distances: expected 6 for model.layers.0.self_attn"):
        callback = SofteningAnnealing(4, 0.5, distances={"model.layers.0.self_attn": [1.0]})
        train(calibrated()[0], callback, tmp_path)
