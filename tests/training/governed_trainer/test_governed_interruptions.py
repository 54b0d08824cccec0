"""Runs that end with an error: the model is free again, and what was decided is written down."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from training.governed_trainer.governed_cases import (
    EAGER,
    assert_same,
    governed_trainer,
    small,
    state_of,
    tiny_llama,
)
from transformers import Trainer, TrainerCallback

from gravity_hf.runtime.ledger import read_ledger
from gravity_hf.runtime.verification import verify
from gravity_hf.training.governed import AuditSettings, GovernedTraining, RouterSettings

# Nothing of another run is left in the numbers.
SETTINGS: dict[str, Any] = {"governors": EAGER, "hierarchy": None}


class Stop(TrainerCallback):
    """As Ctrl-C at a step, once."""

    def __init__(self, step: int) -> None:
        self.left = step

    def on_step_end(self, args, state, control, **kwargs):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def interrupted(governed: GovernedTraining, folder: Any) -> Trainer:
    trainer = governed_trainer(governed, tiny_llama(), folder, Stop(9), max_steps=12)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    return trainer


def test_after_an_interrupted_run_the_same_groups_are_trained_again(tmp_path):
    governed, untouched = small(**SETTINGS), small(**SETTINGS)
    model = interrupted(governed, tmp_path).model
    assert any(not parameter.requires_grad for parameter in model.parameters())
    model.load_state_dict(tiny_llama().state_dict())
    sizes = governed.sizes()
    governed_trainer(governed, model, tmp_path).train()
    assert governed.sizes() == sizes

    fresh = tiny_llama()
    governed_trainer(untouched, fresh, tmp_path).train()
    assert_same(state_of(model), state_of(fresh))
    assert governed.report() == untouched.report()


def test_after_an_interrupted_run_only_the_new_router_routes(tmp_path):
    governed = small(hierarchy=None, router=RouterSettings(max_active_groups=2))
    trainer = interrupted(governed, tmp_path)
    hooks = trainer.model.get_input_embeddings()._forward_pre_hooks
    assert len(hooks) == 1
    trainer.train()
    assert not hooks


def test_a_run_that_is_refused_leaves_no_router_behind(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    trainer = governed_trainer(small(router=RouterSettings()), model, tmp_path)
    with pytest.raises(ValueError, match="head of zeros"):
        trainer.train()
    assert not model.get_input_embeddings()._forward_pre_hooks
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_changes_are_in_the_ledger_when_the_run_dies(tmp_path):
    audit = AuditSettings(tmp_path / "governed.jsonl", every=1)
    governed = small(**SETTINGS, audit=audit)
    interrupted(governed, tmp_path)
    assert verify(audit.path).ok
    entries = list(read_ledger(audit.path))
    changes = [entry.payload for entry in entries if entry.event == "governed_change"]
    assert changes == governed.report()["changes"] and len(changes) > 2
