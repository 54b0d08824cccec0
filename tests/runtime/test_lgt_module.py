"""The runtime module works for every gravity model and leaves it as it found it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hosts import tiny_host, tiny_inputs
from runtime.test_mirror import GOLDEN
from runtime.watched import tiny_lgt, tiny_tri, token_ids

from gravity_hf import GravityConfig, patch_with_gravity
from gravity_hf.runtime import LGTVictorOSModule, read_ledger, verify

INFERENCE = ["seq_len", "stability_score", "corrections", "output_mean", "output_std"]


def _host(name: str) -> Any:
    return patch_with_gravity(tiny_host(name), GravityConfig())


CASES = {
    "lgt ids": (tiny_lgt, token_ids, (2, 9, 40)),
    "lgt embeddings": (tiny_lgt, lambda: torch.randn(2, 5, 16), (2, 5, 40)),
    "decoder": (lambda: _host("qwen2"), lambda: tiny_inputs("qwen2"), (2, 11, 97)),
    "encoder": (lambda: _host("bert"), lambda: tiny_inputs("bert")["input_ids"], (2, 11, 97)),
    "vision": (lambda: _host("vit"), lambda: tiny_inputs("vit")["pixel_values"], (2, 5)),
    "tri-model": (
        tiny_tri,
        lambda: {f"{x}_inputs_embeds": torch.randn(1, 5, 16) for x in ("world", "self", "env")},
        (1, 5, 16),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_any_gravity_model_is_processed_and_left_as_it_was(case: str) -> None:
    make, inputs, shape = CASES[case]
    model = make()
    model.train()
    frozen = next(m for m in model.modules() if isinstance(m, torch.nn.LayerNorm | torch.nn.Linear))
    frozen.eval()
    module = LGTVictorOSModule(model)
    result = module.process(inputs())
    assert result["output"].shape == shape
    assert not result["output"].requires_grad
    assert 0.0 < result["stability"] < 1.0
    assert len(result["diagnostics"]["layers"]) >= 2
    assert model.training and not frozen.training
    assert all(m.training for m in model.modules() if m is not frozen)
    (entry,) = module.ledger.entries("inference")
    assert list(entry.payload) == INFERENCE
    assert module.ledger.entries("mirror_layer")


def test_what_is_processed_is_what_the_model_computes() -> None:
    model = tiny_lgt()
    with torch.no_grad():
        expected = model(token_ids()).logits
    module = LGTVictorOSModule(model)
    quiet = module.process(token_ids(), return_diagnostics=False)
    assert torch.equal(quiet["output"], expected)
    assert quiet["diagnostics"] is None and quiet["stability"] == 1.0
    assert torch.equal(module.process(token_ids())["output"], expected)


def test_corrections_are_counted() -> None:
    module = LGTVictorOSModule(tiny_lgt(), max_force_threshold=1e-3)
    module.process(token_ids())
    assert module.corrections == 2
    assert module.ledger.entries("inference")[0].payload["corrections"] == 2


def test_a_snapshot_has_the_published_keys() -> None:
    model = tiny_lgt().train()
    module = LGTVictorOSModule(model)
    snapshot = module.get_snapshot(token_ids())
    assert snapshot["model_config"] == {"dim_model": 16, "curvature": 0.15, "num_layers": 2}
    assert len(snapshot["attention_metrics"]["layers"]) == 2
    assert snapshot["timestamp"] > 1e9
    assert model.training
    assert module.ledger.entries("snapshot")[0].payload == {
        "model_config": snapshot["model_config"]
    }


@pytest.mark.parametrize(
    "case", json.loads(GOLDEN.read_text())["propose_architecture_change"], ids=lambda x: x["force"]
)
def test_proposals_are_the_published_ones(case: dict) -> None:
    module = LGTVictorOSModule(tiny_lgt())
    if case["force"] is not None:
        module.mirror_layer(0, {"mean_force": case["force"]})
    assert module.mirror_layer.stability_score() == pytest.approx(case["score"], rel=1e-12)
    proposal = module.propose_architecture_change({"num_layers": 4, "curvature": 0.15})
    assert proposal == case["proposal"]
    logged = [entry.payload for entry in module.ledger.entries("architecture_proposal")]
    assert logged == ([] if proposal is None else [proposal])


def test_a_proposal_is_applied_and_logged(tmp_path: Path) -> None:
    file = tmp_path / "ledger.jsonl"
    module = LGTVictorOSModule(tiny_lgt(), "agent", file)
    before = module.process(token_ids(), return_diagnostics=False)["output"]
    proposal = module.propose_architecture_change()
    assert proposal["new_num_layers"] == 3
    change = module.apply_architecture_change(proposal)
    assert change.after == 3
    after = module.process(token_ids())
    assert (after["output"] - before).abs().max() < 1e-4 * before.abs().max()
    assert len(after["diagnostics"]["layers"]) == 3
    module.ledger.flush()
    assert verify(file).ok
    events = [entry.event for entry in read_ledger(file)]
    assert events[:3] == ["inference", "architecture_proposal", "architecture_change"]


def test_a_grown_model_comes_back_from_its_checkpoint(tmp_path: Path) -> None:
    module = LGTVictorOSModule(tiny_lgt())
    module.apply_architecture_change(module.propose_architecture_change())
    module.save_checkpoint(tmp_path / "c")
    again = LGTVictorOSModule(tiny_lgt(num_hidden_layers=3))
    again.load_checkpoint(tmp_path / "c")
    quiet = {"return_diagnostics": False}
    outputs = [m.process(token_ids(), **quiet)["output"] for m in (module, again)]
    assert torch.equal(*outputs)


@pytest.mark.parametrize("force", [None, 1.0])
def test_what_cannot_grow_gets_no_proposal(force: float | None) -> None:
    for model in (tiny_tri(), _host("qwen2")):
        module = LGTVictorOSModule(model)
        if force is not None:
            module.mirror_layer(0, {"mean_force": force})
        assert module.propose_architecture_change() is None


def test_a_single_number_has_no_spread() -> None:
    module = LGTVictorOSModule(tiny_lgt(vocab_size=1))
    module.process(torch.zeros(1, 1, dtype=torch.long))
    assert module.ledger.entries("inference")[0].payload["output_std"] == 0.0


def test_an_input_that_is_no_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a tensor"):
        LGTVictorOSModule(tiny_lgt()).process([1, 2])


def test_a_model_without_gravity_is_refused() -> None:
    with pytest.raises(TypeError, match="expected a model with gravity"):
        LGTVictorOSModule(tiny_host("qwen2"))
