"""Containment: published summaries, every kind of gravity damped, stops that spare the model."""

from __future__ import annotations

import math

import pytest
import torch
from hosts import tiny_host
from torch import nn
from training.lgt_cases import assert_same, golden_numbers, state_of, tiny_lgt, trainer_of

from gravity_hf import GravityConfig, patch_with_gravity
from gravity_hf.integration.hosts import gravity_modules
from gravity_hf.runtime import Ledger, MirrorLayer
from gravity_hf.training.containment import (
    ContainmentCallback,
    ContainmentConfig,
    ContainmentProtocol,
)
from gravity_hf.training.damping import damp_gravity, mean_force


def constants(model):
    return torch.cat([layer.attn.gravity.G.detach() for layer in model.model.layers])


def squared_masses(host):
    return torch.cat([m().mass.detach().square() for m in gravity_modules(host).values()])


def observers(model):
    modules = (getattr(m, "gravity", None) for m in model.modules())
    return [m.observer for m in modules if m is not None]


@pytest.fixture(scope="module")
def published_run():
    case = golden_numbers("containment")
    model = tiny_lgt(
        vocab_size=50, hidden_size=32, num_hidden_layers=2, dim_position=64,
        max_position_embeddings=128,
    )  # fmt: skip
    ledger = Ledger("training")
    protocol = ContainmentProtocol(ContainmentConfig(**case["config"]), model, ledger)
    summaries = []
    for record in case["records"]:
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, record["grad_fill"])
        forces = record["forces"]
        told = None if forces is None else {"layers": [{"mean_force": f} for f in forces]}
        summaries.append(protocol.step(torch.tensor(float(record["loss"])), told))
    return case, model, ledger, summaries


def test_summaries_are_the_published_ones(published_run):
    case, _, _, summaries = published_run
    for summary, record in zip(summaries, case["records"], strict=True):
        expected = dict(record["summary"])
        assert summary.pop("loss") == pytest.approx(float(expected.pop("loss")), nan_ok=True)
        assert summary.pop("stability") == pytest.approx(expected.pop("stability"), rel=1e-12)
        assert summary == expected


def test_damping_and_ledger_are_the_published_ones(published_run):
    case, model, ledger, _ = published_run
    torch.testing.assert_close(constants(model), torch.tensor(case["G_after"]))
    lines = [(entry.event, entry.payload) for entry in ledger.entries()]
    assert [event for event, _ in lines] == [event for event, _ in case["ledger"]]
    # All gradients are 1. The published model has parameters that it never reads.
    count = sum(parameter.numel() for parameter in model.parameters())
    for (event, payload), (_, expected) in zip(lines, case["ledger"], strict=True):
        if event == "grad_clip":
            assert payload["total_norm"] == pytest.approx(math.sqrt(count), rel=1e-5)
        elif event != "containment_stop":
            assert payload == expected


class Fusion(nn.Module):
    def __init__(self):
        super().__init__()
        self.G = nn.Parameter(torch.tensor(-1.4))


def test_damping_reaches_stacked_scalar_and_shared_constants_once():
    model = tiny_lgt(num_hidden_layers=2)
    model.fusion = Fusion()
    model.again = model.fusion
    before = constants(model)
    assert damp_gravity(model, 0.9) == 3
    torch.testing.assert_close(constants(model), 0.9 * before)
    assert model.fusion.G.item() == pytest.approx(-1.26)


def test_what_is_frozen_is_not_damped():
    model, ledger = tiny_lgt(), Ledger()
    model.requires_grad_(False)
    before = constants(model)
    protocol = ContainmentProtocol(ContainmentConfig(max_attention_force=1.0), model, ledger)
    assert not protocol.step(1.0, {"mean_force": 2.0})["damped"]
    assert torch.equal(constants(model), before)
    assert ledger.entries("attention_dampening") == []


def test_a_loss_with_its_gradient_is_taken(recwarn):
    ContainmentProtocol(ContainmentConfig(), tiny_lgt()).step(torch.ones((), requires_grad=True))
    assert not [w for w in recwarn if "requires_grad" in str(w.message)]


@pytest.mark.parametrize("curvature", [0.0, 0.7])
def test_no_curvature_is_proposed_that_is_not_more(curvature):
    protocol = ContainmentProtocol(ContainmentConfig(), tiny_lgt(curvature=curvature))
    protocol.stability = 0.96
    assert protocol.propose() is None


def test_damping_a_host_multiplies_its_squared_masses():
    host = patch_with_gravity(tiny_host("qwen2"), GravityConfig(mass_init=7.0))
    before = squared_masses(host)
    damp_gravity(host, 0.9)
    torch.testing.assert_close(squared_masses(host), 0.9 * before)


def test_a_mirrors_report_counts_with_its_true_mean_force():
    model, mirror = tiny_lgt(num_hidden_layers=2), MirrorLayer(rows=None)
    with mirror.watch(model), torch.no_grad():
        model(torch.arange(8)[None])
    report = mirror.report()
    assert mean_force(report) == pytest.approx(report.mean_force)
    limit = report.mean_force * 0.99
    protocol = ContainmentProtocol(ContainmentConfig(max_attention_force=limit), model)
    summary = protocol.step(1.0, report)
    assert summary["damped"]
    assert summary["stability"] == pytest.approx(0.95 + 0.05 / (1 + 1 / 0.99))


@pytest.mark.parametrize(
    ("told", "force"),
    [
        ({"world": {"layers": [{"mean_force": 2.0}]}, "env": {"layers": [{"mean_force": 4.0}]}}, 3),
        ({"layers": []}, 0.0),
        ({"layers": [{"mean_force": float("nan")}]}, math.inf),
    ],
    ids=["streams", "no layers", "nan"],
)
def test_forces_are_read_from_every_form(told, force):
    assert mean_force(told) == force


def test_gradients_that_are_not_finite_stop_before_anything_is_changed():
    model, ledger = tiny_lgt(), Ledger()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    next(model.parameters()).grad[0, 0] = math.nan
    summary = ContainmentProtocol(ContainmentConfig(), model, ledger).step(1.0)
    assert summary["stopped"] and not summary["clipped"]
    assert model.lm_head.weight.grad.eq(1).all()
    assert ledger.entries()[0].payload["reason"] == "divergence"


def test_a_converted_host_is_not_told_to_grow():
    host = patch_with_gravity(tiny_host("qwen2"), GravityConfig())
    assert ContainmentProtocol(ContainmentConfig(), host).step(1.0)["proposal"] is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_grad_norm": 0},
        {"min_loss": 5.0, "max_loss": 1.0},
        {"bekenstein_lambda": math.nan},
        {"proposal_min_interval": 0.5},
        {"stability_proposal_threshold": math.nan},
    ],
)
def test_limits_that_contain_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match="ContainmentConfig"):
        ContainmentConfig(**wrong)


def test_the_trainer_damps_a_force_over_the_limit(tmp_path):
    model, ledger = tiny_lgt(), Ledger()
    before = constants(model)
    callback = ContainmentCallback({"max_attention_force": 1e-3}, ledger=ledger, every=2)
    trainer_of(model, tmp_path, callback, learning_rate=0.0, max_steps=4).train()
    # Measured at steps 0 and 2.
    torch.testing.assert_close(constants(model), 0.81 * before)
    forces = [e.payload["mean_force"] for e in ledger.entries("attention_dampening")]
    assert forces[1] == pytest.approx(0.9 * forces[0], rel=0.3)
    assert observers(model) == [None]


def test_the_trainer_damps_a_patched_host(tmp_path):
    host = patch_with_gravity(tiny_host("qwen2"), GravityConfig())
    before = squared_masses(host)
    callback = ContainmentCallback({"max_attention_force": 1e-3}, every=1)
    trainer_of(host, tmp_path, callback, learning_rate=0.0, max_steps=1).train()
    torch.testing.assert_close(squared_masses(host), 0.9 * before)


def test_layers_that_are_recomputed_train_as_without_containment(tmp_path):
    def trained(*callbacks):
        model = tiny_lgt(num_hidden_layers=2)
        checkpointing = {"gradient_checkpointing": True, "max_steps": 2}
        trainer_of(model, tmp_path, *callbacks, **checkpointing).train()
        return state_of(model)

    assert_same(trained(ContainmentCallback({"max_grad_norm": 1e9}, every=1)), trained())


def test_the_trainer_clips(tmp_path):
    ledger = Ledger()
    callback = ContainmentCallback({"max_grad_norm": 1e-3}, ledger=ledger, every=0)
    trainer_of(tiny_lgt(), tmp_path, callback, max_steps=2, max_grad_norm=0).train()
    assert [entry.event for entry in ledger.entries("grad_clip")] == ["grad_clip"] * 2


def test_a_step_with_nan_gradients_ends_training_and_spares_the_model(tmp_path):
    model, steps = tiny_lgt(), []

    def spoil(gradient):
        steps.append(None)
        return gradient * math.nan if len(steps) == 3 else gradient

    model.lm_head.weight.register_hook(spoil)
    ledger = Ledger()
    trainer = trainer_of(model, tmp_path, ContainmentCallback(ledger=ledger))
    trainer.train()
    assert trainer.state.global_step == 3
    assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
    assert [e.payload["reason"] for e in ledger.entries("containment_stop")] == ["divergence"]


def test_a_stop_is_told_once_though_the_filter_hides_the_loss(tmp_path):
    model, ledger = tiny_lgt(), Ledger()
    model.lm_head.weight.register_hook(lambda gradient: gradient * math.nan)
    limits = {"min_loss": 1e3}
    trainer_of(model, tmp_path, ContainmentCallback(limits, ledger=ledger)).train()
    assert len(ledger.entries("containment_stop")) == 1


@pytest.mark.parametrize(
    ("limits", "reason"), [({"max_loss": 0.1}, "divergence"), ({"min_loss": 1e3}, "collapse")]
)
def test_a_logged_loss_outside_of_the_limits_ends_training(limits, reason, tmp_path):
    ledger = Ledger()
    trainer = trainer_of(tiny_lgt(), tmp_path, ContainmentCallback(limits, ledger=ledger))
    trainer.train()
    assert trainer.state.global_step == 1
    assert [e.payload["reason"] for e in ledger.entries("containment_stop")] == [reason]


def test_a_resumed_run_is_contained_as_one_that_was_not_interrupted(tmp_path):
    limits = {"max_attention_force": 1e-2, "proposal_min_interval": 4}
    saving = {"save_strategy": "steps", "save_steps": 3}
    whole, through = tiny_lgt(), ContainmentCallback(limits, every=2)
    trainer_of(whole, tmp_path, through, **saving).train()
    resumed, again = tiny_lgt(), ContainmentCallback(limits, every=2)
    trainer = trainer_of(resumed, tmp_path / "again", again)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert again.state() == through.state()
    assert through.state()["attributes"]["progress"]["step_count"] == 6
    assert_same(state_of(resumed), state_of(whole))
