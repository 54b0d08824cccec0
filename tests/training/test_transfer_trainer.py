"""TransferTrainer: what moves, what is logged, what accumulates, what is refused."""

from __future__ import annotations

import math

import pytest
import torch
from hosts import tiny_host, tiny_inputs
from training.transfer_cases import (
    END_TO_END,
    LAYERWISE,
    Examples,
    calibrated,
    logged,
    moved_lora,
    trainer_of,
)
from transformers import AutoModel

from gravity_hf import calibrate, gravity_lora, patch_with_gravity
from gravity_hf.integration.hosts import gravity_modules
from gravity_hf.training.teaching import host_dropout_off
from gravity_hf.training.transfer import (
    TransferSettings,
    train_only_gravity,
    transfer_losses,
)


def test_layerwise_lowers_the_loss_and_moves_masses_and_softenings_alone(tmp_path):
    model = calibrated()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    trainer = trainer_of(model, tmp_path, LAYERWISE, max_steps=12)
    start = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < 0.9 * start
    moved = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert moved == {n for n in before if n.endswith(("mass_log", "softening_log"))}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == flags


def test_softenings_that_are_frozen_stay_frozen(tmp_path):
    model = calibrated()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for module in gravity_modules(model).values():
        module.softening_log.requires_grad = False
    trainer_of(model, tmp_path, LAYERWISE).train()
    with train_only_gravity(model, softenings=False):
        trainer_of(model, tmp_path, END_TO_END).train()
    moved = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert moved == {name for name in before if name.endswith("mass_log")}


@pytest.mark.parametrize("family", ["bert", "cross attention"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_is_free_of_the_host_s_dropout(family, checkpointing, tmp_path):
    """BERT's dropout of 0.1 once made the training loss 40 times the loss to be lowered."""
    options = {"attention_dropout": 0.2} if family == "cross attention" else {}
    model = gravity_lora(calibrated(family, **options), dropout=0.3)
    trainer = trainer_of(
        model, tmp_path, END_TO_END, max_steps=1, learning_rate=0.0, lr_scheduler_type="linear",
        gradient_checkpointing=checkpointing, per_device_train_batch_size=16,
    )  # fmt: skip
    probabilities = [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)]
    trainer.train()
    assert logged(trainer, "loss")[0] == pytest.approx(trainer.evaluate()["eval_loss"], rel=1e-3)
    assert [m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)] == probabilities
    with host_dropout_off(model):
        left = {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)}
        assert 0.3 in left and left <= {0.0, 0.3}


def test_an_encoder_without_labels_trains_and_evaluates(tmp_path):
    host = tiny_host("bert").bert
    model = patch_with_gravity(AutoModel.from_config(host.config))
    model.load_state_dict(host.state_dict(), strict=False)
    data = Examples(labels=False)
    calibrate(model, [tiny_inputs("bert")], progress=False)
    settings = TransferSettings(states=1.0)
    with train_only_gravity(model):
        trainer = trainer_of(model, tmp_path, settings, data=data, max_steps=6)
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
    assert after["eval_loss"] < before["eval_loss"]
    total = after["eval_transfer_outputs"] + after["eval_transfer_states"]
    assert math.isclose(total, after["eval_loss"], rel_tol=1e-5)


def test_every_term_is_logged_and_they_add_up(tmp_path):
    settings = TransferSettings(weights=0.5, logits=2.0, loss=0.1)
    trainer = trainer_of(moved_lora(), tmp_path, settings, max_steps=2)
    trainer.train()
    for entry in trainer.state.log_history:
        if "loss" in entry:
            total = sum(
                getattr(settings, name) * entry[f"transfer_{name}"]
                for name in ("outputs", "weights", "logits", "loss")
            )
            assert math.isclose(total, entry["loss"], rel_tol=1e-4)


@pytest.mark.parametrize("mode", ["layerwise", "end_to_end"])
def test_two_batches_of_two_accumulated_equal_one_batch_of_four(mode, tmp_path):
    """Trainer leaves the loss undivided for hosts that take `num_items_in_batch`."""

    def trained(batch, accumulate):
        model = calibrated() if mode == "layerwise" else moved_lora()
        settings = TransferSettings(mode=mode, weights=0.5)
        trainer = trainer_of(
            model, tmp_path, settings, per_device_train_batch_size=batch, optim="sgd",
            gradient_accumulation_steps=accumulate, max_steps=3, max_grad_norm=0.0,
        )  # fmt: skip
        trainer.train()
        gravity = [m.mass_log.detach() for m in gravity_modules(model).values()]
        return logged(trainer, "loss"), torch.cat(gravity)

    (losses, masses), (accumulated, others) = trained(4, 1), trained(2, 2)
    assert losses == pytest.approx(accumulated, rel=1e-5)
    torch.testing.assert_close(masses, others, rtol=1e-5, atol=1e-6)
    assert losses[0] != losses[-1]


def test_layerwise_refuses_adapters_and_names_the_other_mode(tmp_path):
    with pytest.raises(RuntimeError, match="without adapters.*end_to_end"):
        trainer_of(moved_lora(), tmp_path, LAYERWISE).train()
    with pytest.raises(RuntimeError, match="without adapters.*end_to_end"):
        transfer_losses(moved_lora(), tiny_inputs("qwen2"), LAYERWISE)


def test_a_teacher_that_would_move_is_refused(tmp_path):
    with pytest.raises(RuntimeError, match="only gravity and adapters to be trainable"):
        trainer_of(calibrated(), tmp_path, END_TO_END).train()
