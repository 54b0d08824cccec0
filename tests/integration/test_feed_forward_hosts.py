"""Sparse feed-forward layers in hosts: put in, fitted, saved, and taken out again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hosts import logits, tiny_host, tiny_inputs
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from gravity_hf import (
    LeanFormerConfig,
    LeanFormerForCausalLM,
    load_gravity_model,
    patch_with_gravity,
)
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
from gravity_hf.layers.sparsity_policy import sparsity

SETTINGS = {"block_size": 8, "sparsity": 0.5, "gate_rank": 8}
HOSTS = ["llama", "qwen2", "qwen3", "mistral", "gemma", "olmo"]


def batches(count: int = 40) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 97, (4, 24), generator=generator)} for _ in range(count)]


def sparse_host(name: str = "llama", **changes: object) -> PreTrainedModel:
    return sparsify_feed_forward(tiny_host(name).eval(), **{**SETTINGS, **changes})


@pytest.mark.parametrize("name", HOSTS)
def test_host_is_itself_until_fitted_and_again_afterwards(name: str) -> None:
    model, inputs = tiny_host(name).eval(), tiny_inputs(name)
    before, weights = logits(model, inputs), {k: v.clone() for k, v in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    sparsify_feed_forward(model, **SETTINGS)
    assert len(sparse_layers(model)) == 3
    assert torch.equal(logits(model, inputs), before)
    fit_predictors(model, batches(2), progress=False)
    assert not torch.equal(logits(model, inputs), before)
    densify_feed_forward(model)
    assert torch.equal(logits(model, inputs), before)
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[k], v) for k, v in weights.items())
    assert [type(m) for m in model.modules()] == kinds
    assert not hasattr(model.config, "sparse_feed_forward")


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


def test_fitted_host_is_saved_and_read_again(tmp_path: Path) -> None:
    model, inputs = sparse_host(policy="masked"), tiny_inputs("llama")
    dense = logits(model, inputs)
    fit_predictors(model, batches(2), progress=False)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert torch.equal(logits(again, inputs), dense)
    sparsify_feed_forward(again, policy="masked")
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    assert {layer.block_size for layer in sparse_layers(again).values()} == {8}


def test_checkpoint_without_its_predictors_is_refused(tmp_path: Path) -> None:
    model = sparse_host()
    settings = model.config.sparse_feed_forward
    densify_feed_forward(model)
    model.config.sparse_feed_forward = settings
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="got 6 missing"):
        sparsify_feed_forward(again)
    assert not sparse_layers(again)


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


def test_generation_skips_as_the_mask_would() -> None:
    model, inputs = sparse_host(), tiny_inputs("llama")
    fit_predictors(model, batches(2), progress=False)
    for layer in sparse_layers(model).values():
        layer.impl = "grouped"
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    skipped = model.generate(**inputs, **options)
    with sparsity(model, feed_forward="masked"):
        assert torch.equal(model.generate(**inputs, **options), skipped)


def test_second_call_sets_the_policy_and_other_settings_are_refused() -> None:
    model = sparse_host()
    fit_predictors(model, batches(1), progress=False)
    assert sparsify_feed_forward(model, policy="masked") is model
    assert {layer.policy for layer in sparse_layers(model).values()} == {"masked"}
    with pytest.raises(RuntimeError, match="Call densify_feed_forward"):
        sparsify_feed_forward(model, block_size=16)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt2", "c_fc: two maps and no gate"),
        ("gpt_neox", "dense_h_to_4h: two maps and no gate"),
        ("phi3", "gate_up_proj: gate and up in one map"),
        ("bert", "without any"),
    ],
)
def test_other_layers_are_refused_with_the_reason(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sparsify_feed_forward(tiny_host(name))


def test_layer_that_computes_something_else_is_refused_before_any_change() -> None:
    model = tiny_host("llama")
    last = model.model.layers[2].mlp
    last.forward = lambda x: 2 * type(last).forward(last, x)
    with pytest.raises(ValueError, match=r"layers\.2\.mlp to be down.*computes something else"):
        sparsify_feed_forward(model, **SETTINGS)
    assert not sparse_layers(model)


def test_block_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="divisor of intermediate_size 64, got 48"):
        sparsify_feed_forward(tiny_host("llama"), block_size=48)


def test_gravity_host_is_saved_and_read_again(tmp_path: Path) -> None:
    model, inputs = patch_with_gravity(tiny_host("llama").eval()), tiny_inputs("llama")
    sparsify_feed_forward(model, policy="masked", **SETTINGS)
    fit_predictors(model, batches(1), progress=False)
    model.save_pretrained(tmp_path)
    again = sparsify_feed_forward(load_gravity_model(tmp_path).eval(), policy="masked")
    assert torch.equal(logits(again, inputs), logits(model, inputs))


@pytest.mark.parametrize("kind", ["4-bit", "8-bit"])
def test_quantized_maps_are_masked(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    tiny_host("llama", hidden_size=64, num_attention_heads=4).save_pretrained(tmp_path)
    config = BitsAndBytesConfig(load_in_4bit=kind == "4-bit", load_in_8bit=kind == "8-bit")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, dtype=torch.bfloat16
    )
    inputs = tiny_inputs("llama")
    before = logits(model, inputs)
    sparsify_feed_forward(model, policy="masked", **SETTINGS)
    assert torch.equal(logits(model, inputs), before)
    fit_predictors(model, batches(1), progress=False)
    masked = logits(model, inputs)
    with sparsity(model, feed_forward="block"):
        assert torch.equal(logits(model, inputs), masked)
    assert not torch.equal(masked, before)
    with pytest.raises(ValueError, match="got adapters, quantized or watched maps"):
        calibrate_blocks(model, batches(1))


def test_adapters_come_after() -> None:
    peft = pytest.importorskip("peft")
    model = sparse_host(policy="masked")
    fit_predictors(model, batches(1), progress=False)
    inputs = tiny_inputs("llama")
    before = logits(model, inputs)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["up_proj"]))
    with sparsity(adapted, feed_forward="block"):
        assert torch.equal(logits(adapted.eval(), inputs), before)
    with pytest.raises(RuntimeError, match="LoRA"):
        densify_feed_forward(adapted)
