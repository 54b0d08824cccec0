"""Predictors of sparse feed-forward layers, fitted, and neurons put in order, in any model."""

from __future__ import annotations

import pytest
import torch
from hosts import logits, tiny_host, tiny_inputs
from integration.feed_forward_cases import SETTINGS, batches, sparse_host
from torch import Tensor

from gravity_hf import LeanFormerConfig, LeanFormerForCausalLM
from gravity_hf.integration.predictor_fit import (
    calibrate_blocks,
    fit_predictors,
    measure_feed_forward,
)
from gravity_hf.integration.sparse_feed_forward import (
    densify_feed_forward,
    sparse_layers,
    sparsify_feed_forward,
)


def test_fit_finds_more_energy_than_chance_and_changes_no_weight() -> None:
    model = sparse_host()
    held_out = batches(41)[40:]
    weights = {n: p.clone() for n, p in model.named_parameters() if "predictor" not in n}
    before = measure_feed_forward(model, held_out)
    report = fit_predictors(model, batches(), progress=False)
    after = measure_feed_forward(model, held_out)
    assert report.steps == 40
    assert report.random_recall == 0.5
    assert report.loss_after < report.loss_before
    for name in before:
        assert after[name].energy_recall > before[name].energy_recall + 0.05
        assert after[name].active == 0.5
    assert all(torch.equal(p, weights[n]) for n, p in model.named_parameters() if n in weights)
    assert all(p.grad is None for p in model.parameters())


def test_frozen_model_is_fitted_and_frozen_afterwards() -> None:
    model = sparse_host().requires_grad_(False)
    before = model.model.layers[0].mlp.predictor.up.weight.clone()
    fit_predictors(model, batches(1), progress=False)
    assert not torch.equal(model.model.layers[0].mlp.predictor.up.weight, before)
    assert not any(p.requires_grad for p in model.parameters())


def test_leanformer_is_fitted_too_and_keeps_its_policy() -> None:
    sizes = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model = LeanFormerForCausalLM(
        LeanFormerConfig(**sizes, intermediate_size=64, feed_forward_block=8, gate_rank=4)
    ).eval()
    ids = tiny_inputs("llama")["input_ids"]
    before = model(input_ids=ids).logits
    calibrate_blocks(model, batches(1))
    report = fit_predictors(model, batches(20), progress=False)
    assert report.loss_after < report.loss_before
    torch.testing.assert_close(model(input_ids=ids).logits, before, rtol=0, atol=1e-4)
    assert {layer.policy for layer in sparse_layers(model).values()} == {"dense"}


def test_padding_teaches_nothing() -> None:
    def fitted(pad_with: int) -> Tensor:
        ids, mask = torch.randint(3, 97, (4, 24)), torch.ones(4, 24, dtype=torch.long)
        mask[:, 18:] = 0
        ids = ids.where(mask.bool(), pad_with)
        model = sparse_host()
        fit_predictors(model, [{"input_ids": ids, "attention_mask": mask}], progress=False)
        return model.model.layers[0].mlp.predictor.up.weight

    torch.manual_seed(0)
    first = fitted(0)
    torch.manual_seed(0)
    assert torch.equal(fitted(50), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_hosts_are_fitted_as_well(dtype: torch.dtype) -> None:
    reports = []
    for kind in (torch.float32, dtype):
        model = sparsify_feed_forward(tiny_host("llama").to(kind).eval(), **SETTINGS)
        reports.append(fit_predictors(model, batches(), progress=False))
        assert model.model.layers[0].mlp.predictor.up.weight.dtype == kind
    assert reports[1].loss_after == pytest.approx(reports[0].loss_after, abs=0.01)


class _Early(torch.nn.Module):
    """A model of which a batch reaches the first layer only."""

    def __init__(self) -> None:
        super().__init__()
        self.host = sparse_host()

    def forward(self, input_ids: Tensor) -> Tensor:
        embedded = self.host.get_input_embeddings()(input_ids)
        return self.host.model.layers[0].mlp(embedded)


def test_layers_that_no_batch_reaches_stay_as_they_are() -> None:
    model = _Early()
    last = model.host.model.layers[2].mlp
    weights = {n: p.clone() for n, p in last.named_parameters()}
    calibrate_blocks(model, batches(1), progress=False)
    report = fit_predictors(model, batches(1), progress=False)
    assert report.unreached == tuple(f"host.model.layers.{i}.mlp" for i in (1, 2))
    assert [layer.policy for layer in sparse_layers(model).values()] == ["block", "dense", "dense"]
    assert all(torch.equal(p, weights[n]) for n, p in last.named_parameters())
    model.host.model.layers[0].mlp = torch.nn.Identity()
    with pytest.raises(ValueError, match="got one that reaches none"):
        fit_predictors(model, batches(1), progress=False)


def test_fit_under_adapters_is_noted_in_the_host_s_config() -> None:
    peft = pytest.importorskip("peft")
    model = sparse_host()
    assert len(model.config.sparse_feed_forward["unfitted"]) == 3
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    fit_predictors(adapted, batches(1), progress=False)
    assert model.config.sparse_feed_forward["unfitted"] == []


def test_blocks_of_co_active_neurons_keep_the_function_and_are_undone() -> None:
    model, inputs = tiny_host("llama").eval(), tiny_inputs("llama")
    before, weights = logits(model, inputs), {k: v.clone() for k, v in model.state_dict().items()}
    sparsify_feed_forward(model, **SETTINGS)
    calibrate_blocks(model, batches(2))
    changed = model.state_dict()["model.layers.0.mlp.up_proj.weight"]
    assert not torch.equal(changed, weights["model.layers.0.mlp.up_proj.weight"])
    torch.testing.assert_close(logits(model, inputs), before, rtol=0, atol=1e-4)
    densify_feed_forward(model)
    assert all(torch.equal(v, weights[k]) for k, v in model.state_dict().items())
