"""Sparse feed-forward layers in hosts: put in, fitted, saved, and taken out again."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hosts import logits, tiny_host, tiny_inputs
from integration.feed_forward_cases import SETTINGS, batches, sparse_host
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from gravity_hf import load_gravity_model, patch_with_gravity
from gravity_hf.integration.predictor_fit import calibrate_blocks, fit_predictors
from gravity_hf.integration.sparse_feed_forward import (
    densify_feed_forward,
    sparse_layers,
    sparsify_feed_forward,
)
from gravity_hf.layers.sparsity_policy import sparsity

HOSTS = ["llama", "qwen2", "qwen3", "mistral", "gemma", "olmo"]


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


def test_host_saved_before_it_is_fitted_stays_dense_until_then(tmp_path: Path) -> None:
    model, inputs = sparse_host(), tiny_inputs("llama")
    model.save_pretrained(tmp_path)
    again = sparsify_feed_forward(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    assert {layer.policy for layer in sparse_layers(again).values()} == {"dense"}
    fit_predictors(again, batches(1), progress=False)
    again.save_pretrained(tmp_path)
    third = sparsify_feed_forward(AutoModelForCausalLM.from_pretrained(tmp_path).eval())
    assert {layer.policy for layer in sparse_layers(third).values()} == {"block"}


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


def test_layer_that_drops_in_training_is_refused() -> None:
    model = tiny_host("llama").eval()
    first = model.model.layers[0].mlp
    whole = type(first).forward
    first.forward = lambda x: torch.dropout(whole(first, x), 0.1, first.training)
    with pytest.raises(ValueError, match="something else in training"):
        sparsify_feed_forward(model, **SETTINGS)
    assert not any(module.training for module in model.modules())


def test_activation_with_weights_is_refused() -> None:
    model = tiny_host("llama")
    model.model.layers[0].mlp.act_fn = torch.nn.PReLU()
    with pytest.raises(ValueError, match="an activation without weights, got PReLU"):
        sparsify_feed_forward(model, **SETTINGS)


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
