"""Trainer's course in the ledger."""

from __future__ import annotations

import pytest
from training.lgt_cases import tiny_lgt, trainer_of

from gravity_hf.runtime import Ledger, read_ledger
from gravity_hf.training.ledger_lines import LedgerCallback


@pytest.fixture(scope="module")
def course(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    callback = LedgerCallback(Ledger("trainer", folder / "log.jsonl"))
    trainer = trainer_of(
        tiny_lgt(), folder, callback, max_steps=4, logging_steps=2, eval_strategy="steps",
        eval_steps=4, save_strategy="steps", save_steps=4,
    )  # fmt: skip
    trainer.train()
    return trainer, list(read_ledger(folder / "log.jsonl"))


def test_the_file_has_every_step_evaluation_and_checkpoint_in_order(course):
    _, lines = course
    assert [(line.event, line.payload["step"]) for line in lines] == [
        ("training_started", 0),
        ("train_step", 2),
        ("train_step", 4),
        ("eval_step", 4),
        ("checkpoint", 4),
        ("training_finished", 4),
    ]
    assert lines[-1].payload["stopped"] is False


def test_the_numbers_are_those_that_the_trainer_logged(course):
    trainer, lines = course
    history = trainer.state.log_history
    losses = [log["loss"] for log in history if "loss" in log]
    assert [line.payload["loss"] for line in lines if line.event == "train_step"] == losses
    (evaluated,) = [line.payload["val_loss"] for line in lines if line.event == "eval_step"]
    assert evaluated == next(log["eval_loss"] for log in history if "eval_loss" in log)
