"""A model grows only as it can, and not in what it computes at that moment."""

from __future__ import annotations

import json

import pytest
import torch
from hosts import tiny_host
from runtime.test_mirror import GOLDEN
from runtime.watched import tiny_lgt, tiny_tri, token_ids

from gravity_hf import GravityConfig, patch_with_gravity
from gravity_hf.runtime import Ledger, apply_architecture_change, propose_architecture_change
from gravity_hf.runtime.growth import CurvatureGrowth

ADD = {"change": "add_layer", "new_num_layers": 3, "reason": "why"}
BEND = {"change": "increase_curvature", "new_curvature": 0.3}


@pytest.mark.parametrize(
    "case", json.loads(GOLDEN.read_text())["propose_architecture_change"], ids=lambda x: x["force"]
)
def test_the_published_scoring(case: dict) -> None:
    proposal = propose_architecture_change({"num_layers": 4, "curvature": 0.15}, case["score"])
    assert proposal == case["proposal"]


def test_what_a_config_does_not_say_is_as_published() -> None:
    assert propose_architecture_change({}, 1.0)["new_num_layers"] == 5
    assert propose_architecture_change({}, 0.97)["new_curvature"] == 0.165
    assert propose_architecture_change({"curvature": 0.49}, 0.97)["new_curvature"] == 0.5
    assert propose_architecture_change({}, 0.5, stability_threshold=0.6) is None
    assert propose_architecture_change(tiny_lgt().config, 1.0)["new_num_layers"] == 3


def test_a_new_layer_changes_nothing_and_can_be_trained() -> None:
    model, ledger = tiny_lgt(), Ledger()
    with torch.no_grad():
        before = model(token_ids()).logits
    change = apply_architecture_change(model, ADD, ledger=ledger)
    with torch.no_grad():
        after = model(token_ids()).logits
    assert (before - after).abs().max() < 1e-4 * before.abs().max()
    assert (change.before, change.after, model.config.num_hidden_layers) == (2, 3, 3)
    assert change.parameters and all("layers.2." in name for name in change.parameters)
    model(token_ids(), labels=token_ids()).loss.backward()
    assert any(p.grad is not None and p.grad.any() for p in change.parameters.values())
    (entry,) = ledger.entries("architecture_change")
    assert entry.payload == {"change": "add_layer", "before": 2, "after": 3, "reason": "why"}


def test_curvature_moves_in_a_straight_line_from_where_it_is() -> None:
    model = tiny_lgt()
    with torch.no_grad():
        before = model(token_ids()).logits
        change = apply_architecture_change(model, BEND, steps=3)
        assert torch.equal(model(token_ids()).logits, before)
        assert model.curvature == 0.15 and not change.growth.done
        assert [change.growth.step() for _ in range(4)] == pytest.approx([0.2, 0.25, 0.3, 0.3])
        assert change.growth.done
        assert not torch.allclose(model(token_ids()).logits, before)


@pytest.mark.parametrize(
    ("proposal", "message"),
    [
        ({"change": "shrink"}, "expected change"),
        ({}, "expected change"),
        ({"change": "add_layer"}, "expected a number"),
        ({**ADD, "new_num_layers": 9}, "a proposal for 3 layers"),
        ({**ADD, "new_num_layers": True}, "expected a number"),
        ({**BEND, "new_curvature": 1.5}, "expected |target| < 1"),
        ({**BEND, "new_curvature": float("nan")}, "expected |target| < 1"),
    ],
)
def test_a_proposal_that_does_not_fit_is_refused_before_anything_changes(
    proposal: dict, message: str
) -> None:
    model, ledger = tiny_lgt(), Ledger()
    state = list(model.state_dict())
    with pytest.raises(ValueError) as error:
        apply_architecture_change(model, proposal, ledger=ledger)
    assert message in str(error.value)
    assert list(model.state_dict()) == state
    assert (model.config.num_hidden_layers, model.curvature) == (2, 0.15)
    assert len(ledger) == 0


@pytest.mark.parametrize("proposal", [ADD, BEND], ids=["add_layer", "increase_curvature"])
def test_models_that_cannot_grow_say_so(proposal: dict) -> None:
    host = patch_with_gravity(tiny_host("qwen2"), GravityConfig())
    for model in (host, tiny_tri()):
        with pytest.raises(TypeError, match="such as an LGT"):
            apply_architecture_change(model, proposal)


@pytest.mark.parametrize("proposal", [ADD, BEND], ids=["add_layer", "increase_curvature"])
def test_a_model_with_adapters_is_merged_before_it_grows(proposal: dict) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(tiny_lgt(), peft.LoraConfig(target_modules=["out_proj"]))
    for model in (adapted, adapted.get_base_model()):
        with pytest.raises(TypeError, match="Merge first"):
            apply_architecture_change(model, proposal)
    assert adapted.get_base_model().config.num_hidden_layers == 2
    apply_architecture_change(adapted.merge_and_unload(), proposal)


@pytest.mark.parametrize("curvature", [0.7, 0.5, 0.0, -0.5])
def test_no_curvature_is_proposed_that_is_not_more(curvature: float) -> None:
    assert propose_architecture_change({"curvature": curvature}, 0.96) is None
    assert propose_architecture_change({"curvature": -0.2}, 0.96)["new_curvature"] == -0.22


def test_a_stability_that_is_no_number_proposes_nothing() -> None:
    assert propose_architecture_change({}, float("nan")) is None


def test_growth_in_no_steps_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        CurvatureGrowth(tiny_lgt(), 0.2, steps=0)
