"""Hosts with 4-bit and 8-bit weights: gravity runs on them, and its masses are never quantised."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from hosts import logits, tiny_host, tiny_inputs
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Qwen2ForCausalLM, TorchAoConfig

from gravity_hf import (
    GravityConfig,
    calibrate,
    gravity_lora,
    gravity_status,
    load_gravity_model,
    patch_with_gravity,
    unpatch_gravity,
)
from gravity_hf.integration.hosts import gravity_modules
from gravity_hf.layers.parameters import GravityParameters

# One 4-bit block is 64 weights.
SHAPE = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2}
GREEDY = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
KINDS = ["4-bit", "8-bit", "int8 weights"]


def quantisation(kind, compute_dtype=torch.float32):
    """What `from_pretrained` takes; skips where its library is missing."""
    library = "torchao" if kind == "int8 weights" else "bitsandbytes"
    if importlib.util.find_spec(library) is None:
        pytest.skip(f"{library} is not installed")
    if kind == "4-bit":
        return BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute_dtype
        )
    if kind == "8-bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    from torchao.quantization import Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A host, and the gravity model calibrated from it, in float32 on disk."""
    folder = tmp_path_factory.mktemp("float32")
    model = tiny_host("qwen2", **SHAPE)
    model.save_pretrained(folder / "host")
    patch_with_gravity(model)
    calibrate(model, [tiny_inputs("qwen2")], progress=False)
    model.save_pretrained(folder / "gravity")
    return folder


def load_host(folders, kind, **options):
    config = quantisation(kind)
    return AutoModelForCausalLM.from_pretrained(
        folders / "host", quantization_config=config, **options
    )


def calls_of(model):
    """Counts what asks gravity modules for their masses from now on."""
    calls = []
    for module in gravity_modules(model).values():
        module.register_forward_hook(lambda *_: calls.append(1))
    return calls


def states(model):
    return {name: t for name, t in model.state_dict().items() if ".gravity." in name}


def is_quantised(linear):
    return not linear.weight.is_floating_point() or type(linear.weight.data) is not torch.Tensor


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_host_is_patched_calibrated_and_unpatched(kind, folders):
    model, inputs = load_host(folders, kind), tiny_inputs("qwen2")
    expected = logits(model, inputs)
    patch_with_gravity(model)
    assert is_quantised(model.model.layers[0].self_attn.q_proj)
    assert (logits(model, inputs) - expected).abs().max() > 1.0
    calibrate(model, [inputs], softness=16.0, progress=False)
    calls = calls_of(model)
    found = logits(model, inputs)
    assert len(calls) == 2 and gravity_status(model).patched
    assert not torch.equal(found, expected)
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0)
    assert cosine >= 0.99
    assert torch.equal(logits(unpatch_gravity(model), inputs), expected)
    assert type(model) is Qwen2ForCausalLM


@pytest.mark.parametrize("kind", ["4-bit", "int8 weights"])
def test_gravity_on_quantised_weights_is_gravity_on_the_numbers_they_stand_for(kind, folders):
    """8-bit matrices of bitsandbytes round activations, too; there is no such number for them."""
    # On some CPUs bitsandbytes repacks 4-bit weights for bfloat16 arithmetic in evaluation mode.
    model, inputs = load_host(folders, kind).train(), tiny_inputs("qwen2")
    plain = tiny_host("qwen2", **SHAPE)
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and is_quantised(model.get_submodule(name)):
            module.weight.data = dequantised(model.get_submodule(name))
    settings = GravityConfig(implementation="reference")
    expected = logits(patch_with_gravity(plain, settings), inputs)
    found = logits(patch_with_gravity(model), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def dequantised(linear):
    state = getattr(linear.weight, "quant_state", None)
    if state is None:
        return linear.weight.dequantize()
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(linear.weight.data, state).to(torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_gravity_model_generates_the_same_with_and_without_cache(kind, folders):
    model, inputs = load_host(folders, kind), tiny_inputs("qwen2", batch=1)
    calibrate(patch_with_gravity(model), [inputs], progress=False)
    calls = calls_of(model)
    cached = model.generate(**inputs, **GREEDY)
    assert len(calls) == 2 * GREEDY["max_new_tokens"]
    assert torch.equal(model.generate(**inputs, **GREEDY, use_cache=False), cached)


@pytest.mark.parametrize("kind", KINDS)
def test_a_gravity_folder_is_quantised_on_load_and_its_masses_are_not(kind, folders):
    inputs = tiny_inputs("qwen2")
    expected = states(load_gravity_model(folders / "gravity"))
    model = load_gravity_model(folders / "gravity", quantization_config=quantisation(kind))
    assert is_quantised(model.model.layers[1].self_attn.v_proj)
    found = states(model)
    assert found.keys() == expected.keys() and len(found) == 6
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    by_hand = patch_with_gravity(load_host(folders, kind))
    calibrate(by_hand, [inputs], progress=False)
    by_hand.load_state_dict(expected, strict=False)
    assert torch.equal(logits(model, inputs), logits(by_hand, inputs))


@pytest.mark.parametrize("kind", KINDS)
def test_a_quantised_gravity_model_comes_back_from_disk_bit_for_bit(kind, folders, tmp_path):
    model, inputs = load_host(folders, kind), tiny_inputs("qwen2")
    calibrate(patch_with_gravity(model), [inputs], progress=False)
    model.save_pretrained(tmp_path)
    loaded = load_gravity_model(tmp_path)
    assert type(loaded) is type(model) and is_quantised(loaded.model.layers[0].mlp.up_proj)
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))
    for name, tensor in states(model).items():
        assert torch.equal(states(loaded)[name], tensor), name


@pytest.mark.parametrize("kind", KINDS)
def test_lora_on_quantised_weights_trains_adapters_and_masses(kind, folders):
    model, inputs = load_host(folders, kind), tiny_inputs("qwen2")
    calibrate(patch_with_gravity(model), [inputs], progress=False)
    model = gravity_lora(model, r=4).train()
    # Calibration runs in evaluation mode, where bitsandbytes repacks 4-bit weights on some CPUs;
    # making a state dict is what undoes it.
    model.state_dict()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    masses = [p for name, p in trained.items() if name.endswith("mass_log")]
    assert len(masses) == 2 and any("lora_B" in name for name in trained)
    assert all("lora_" in name or ".gravity." in name for name in trained)
    for mass in masses:
        assert mass.dtype == torch.float32 and mass.grad.isfinite().all()
        assert mass.grad.abs().max() > 0


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_quantised_hosts_on_a_gpu(kind, folders, tmp_path):
    """As above, in bfloat16 through the kernels: patched, calibrated, generating, from a folder."""
    inputs = {name: tensor.cuda() for name, tensor in tiny_inputs("qwen2").items()}
    options = {
        "quantization_config": quantisation(kind, torch.bfloat16),
        "device_map": {"": 0},
        "dtype": torch.bfloat16,
    }
    model = AutoModelForCausalLM.from_pretrained(folders / "host", **options)
    expected = logits(model, inputs).float()
    calibrate(patch_with_gravity(model), [inputs], softness=16.0, progress=False)
    assert {t.dtype for t in states(model).values()} == {torch.float32}
    calls = calls_of(model)
    found = logits(model, inputs).float()
    assert len(calls) == 2 and not torch.equal(found, expected)
    cosine = torch.nn.functional.cosine_similarity(found.flatten(), expected.flatten(), dim=0)
    assert cosine >= 0.98
    assert model.generate(**inputs, **GREEDY).shape == (2, 11 + GREEDY["max_new_tokens"])
    loaded = load_gravity_model(folders / "gravity", **options)
    assert is_quantised(loaded.model.layers[0].self_attn.q_proj)
    assert any(isinstance(module, GravityParameters) for module in loaded.modules())
    assert logits(loaded, inputs).isfinite().all()
    loaded.save_pretrained(tmp_path)
    again = load_gravity_model(tmp_path, device_map={"": 0})
    assert torch.equal(logits(again, inputs), logits(loaded, inputs))
