"""Curvature while training: the published rule, its repairs, and growth along a line."""

from __future__ import annotations

import json

import pytest
from torch import nn
from training.lgt_cases import assert_same, golden_numbers, state_of, tiny_lgt, trainer_of

from gravity_hf.layers import CurvedPositionEmbedding, FractalPositionEmbedding
from gravity_hf.models.lgt import LGTForCausalLM
from gravity_hf.runtime import Ledger
from gravity_hf.training.curvature import (
    CurvatureGrowthCallback,
    MetaCurvatureCallback,
    MetaCurvatureScheduler,
)


def positions(curvature=0.15):
    return nn.ModuleDict({"pos_embedding": CurvedPositionEmbedding(8, 4, curvature)})


MODELS = {
    "curved": positions,
    "fractal": lambda: nn.ModuleDict({"pos_embedding": FractalPositionEmbedding(8, 8)}),
    "tri": lambda: nn.ModuleDict(
        {
            "world_model": positions(0.25),
            "self_model": positions(0.15),
            "env_model": positions(0.10),
        }
    ),
}


@pytest.mark.parametrize("kind", MODELS)
def test_the_published_rule_gives_the_published_curvatures(kind):
    case = golden_numbers("meta_curvature")
    bounds = (case["lr"], case["min_curvature"], case["max_curvature"])
    scheduler = MetaCurvatureScheduler(MODELS[kind](), *bounds, published=True)
    for taken in case["sequences"][kind]:
        updates = scheduler.step(taken["val_loss"])
        assert updates == pytest.approx(taken["updates"], abs=1e-6)


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), 2.0])
def test_a_loss_that_says_nothing_changes_nothing(loss):
    model = positions()
    scheduler = MetaCurvatureScheduler(model)
    scheduler.step(2.0)
    before = state_of(model)
    assert scheduler.step(loss) == {}
    assert_same(state_of(model), before)
    # Nor is it remembered.
    assert scheduler.step(1.0) == pytest.approx({"pos_embedding.curvature_scale": 0.16})


def test_one_noisy_loss_does_not_turn_a_running_mean():
    def last_move(smoothing):
        scheduler = MetaCurvatureScheduler(positions(), smoothing=smoothing)
        for loss in (4.0, 3.0, 1.0):
            (before,) = (scheduler.step(loss) or {"": 0.15}).values()
        # Worse than the last one, better than the mean of those before.
        (after,) = scheduler.step(1.5).values()
        return after - before

    assert last_move(0.7) == pytest.approx(0.01)
    assert last_move(0.0) == pytest.approx(-0.01)


def test_evaluations_of_the_trainer_move_the_curvature_and_it_resumes(tmp_path):
    evaluating = {"eval_strategy": "steps", "eval_steps": 2, "max_steps": 6}
    saving = {"save_strategy": "steps", "save_steps": 4}
    whole, ledger = tiny_lgt(), Ledger()
    through = MetaCurvatureCallback(0.02, smoothing=0.5, ledger=ledger)
    trainer_of(whole, tmp_path, through, **evaluating, **saving).train()
    resumed, again = tiny_lgt(), MetaCurvatureCallback(0.02, smoothing=0.5)
    trainer = trainer_of(resumed, tmp_path / "again", again, **evaluating)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert again.level == through.level is not None
    assert_same(state_of(resumed), state_of(whole))
    scale = whole.model.pos_embedding.curvature_scale.item()
    updates = [e.payload["updates"] for e in ledger.entries("meta_curvature_update")]
    assert [list(u.values()) for u in updates][-1] == pytest.approx([scale])
    assert len(updates) == 2


def test_a_model_without_curvature_is_refused_before_training(tmp_path):
    class Flat(LGTForCausalLM):
        def named_parameters(self, *args, **kwargs):
            return ((n, p) for n, p in super().named_parameters() if "curvature" not in n)

    trainer = trainer_of(Flat(tiny_lgt().config), tmp_path, MetaCurvatureCallback())
    with pytest.raises(RuntimeError, match="curvature parameters"):
        trainer.train()


class Recorder(CurvatureGrowthCallback):
    def __init__(self, model, target, steps):
        super().__init__(model, target, steps)
        self.model, self.seen = model, []

    def on_step_begin(self, args, state, control, **kwargs):
        self.seen.append(self.model.curvature)


def test_curvature_grows_along_a_line_and_starts_where_it_was(tmp_path):
    model = tiny_lgt(curvature=0.1)
    callback = Recorder(model, 0.5, 4)
    trainer_of(model, tmp_path, callback).train()
    assert callback.seen == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.5])
    assert model.curvature == 0.5


def test_a_run_that_is_resumed_grows_along_the_same_line(tmp_path):
    whole, resumed = tiny_lgt(curvature=0.1), tiny_lgt(curvature=0.1)
    saving = {"save_strategy": "steps", "save_steps": 3}
    trainer_of(whole, tmp_path, CurvatureGrowthCallback(whole, 0.4, 5), **saving).train()
    config = json.loads((tmp_path / "checkpoint-3" / "config.json").read_text())
    assert config["curvature"] == pytest.approx(0.1 + 0.3 * 3 / 5)
    trainer = trainer_of(resumed, tmp_path / "again", CurvatureGrowthCallback(None, 0.4, 5))
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert resumed.curvature == whole.curvature == 0.4
    assert_same(state_of(resumed), state_of(whole))


def test_modules_of_a_model_grow_by_their_names(tmp_path):
    model = tiny_lgt(curvature=0.1)
    callback = CurvatureGrowthCallback(model, {"model": 0.3}, 2)
    trainer_of(model, tmp_path, callback, max_steps=2).train()
    assert model.model.curvature == 0.3


def test_what_cannot_grow_is_refused_at_once():
    with pytest.raises(TypeError, match="curvature"):
        CurvatureGrowthCallback(nn.Linear(2, 2), 0.3, 10)
    with pytest.raises(TypeError, match=r"Name one of \['', 'model'\]"):
        CurvatureGrowthCallback(tiny_lgt(), {"mode": 0.3}, 10)
    with pytest.raises(ValueError, match="target"):
        CurvatureGrowthCallback(tiny_lgt(), 1.5, 10)
    with pytest.raises(ValueError, match="smoothing"):
        MetaCurvatureScheduler(tiny_lgt(), smoothing=1.0)
