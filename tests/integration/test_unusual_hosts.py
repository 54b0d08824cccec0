"""Hosts that do one thing as no other does."""

from __future__ import annotations

import importlib

import pytest
import torch
from hosts import tiny_host, tiny_inputs
from integration.sweep.configs import tiny_model
from integration.sweep.inputs import main_output, tiny_inputs_of
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING
from transformers.masking_utils import causal_mask_function

from gravity_hf import (
    GravityConfig,
    calibrate,
    gravity_status,
    load_gravity_model,
    patch_with_gravity,
    unpatch_gravity,
)
from gravity_hf.integration.attention import gravity_attention_forward
from gravity_hf.integration.hosts import gravity_modules
from gravity_hf.integration.masks import gravity_mask, ordinary
from gravity_hf.integration.sites import routes_through_interface


def needs(model_type):
    if model_type not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {model_type}")
    return model_type


def relative(actual, exact):
    return ((actual - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize("converted", [True, False])
def test_learned_queries_attend_to_the_keys_of_every_window(converted):
    """Blip-2's and Granite Speech's query transformers: one batch of queries for many of keys."""
    model = tiny_host("bert", num_hidden_layers=1)
    if converted:
        patch_with_gravity(model)
    module = model.bert.encoder.layer[0].attention.self
    q, k, v = (torch.randn(batch, 6, 5, 8) for batch in (1, 3, 3))
    output, _ = gravity_attention_forward(module, q, k, v, None)
    expected, _ = gravity_attention_forward(module, q.repeat(3, 1, 1, 1), k, v, None)
    assert output.shape == (3, 5, 6, 8)
    assert torch.equal(output, expected)
    assert not torch.equal(output[0], output[1])


def test_a_mask_asked_for_in_whole_numbers_is_one_of_scores():
    """Diffusion-Gemma makes its masks beside token ids and passes on their dtype."""
    request = {"batch_size": 1, "q_length": 3, "kv_length": 3}
    request["mask_function"] = causal_mask_function
    mask, expected = (
        ordinary(gravity_mask(**request, dtype=dtype)) for dtype in (torch.int64, torch.float32)
    )
    assert mask.dtype == torch.float32 and torch.equal(mask, expected)


def test_a_tower_that_inverts_its_mask_hides_the_padding():
    """Not the sound: upside down, the mask would hide what is real, without an error."""
    model = tiny_model(needs("nemotron_asr_streaming_encoder"), 0).eval()
    features = torch.randn(2, 64, model.config.num_mel_bins)
    mask = torch.ones(2, 64, dtype=torch.long)
    mask[1, 24:] = 0
    inputs = {"input_features": features, "attention_mask": mask}
    with torch.no_grad():
        host = model(**inputs)
        patch_with_gravity(model)
        calibrate(model, [inputs], softness=256.0, progress=False)
        near = model(**inputs).last_hidden_state
        inputs["input_features"] = features.clone()
        inputs["input_features"][1, 40:] += 1.0
        hidden = model(**inputs).last_hidden_state
    real = host.attention_mask.bool()
    assert not real.all()
    assert 0 < relative(near[real], host.last_hidden_state[real]) < 0.01
    assert relative(hidden[real], near[real]) < 1e-5


def test_a_part_made_from_a_copy_of_a_tower_s_config_is_patched_and_restored():
    model = tiny_model("xclip", 0)
    parts = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}.values()
    before = [config._attn_implementation for config in parts]
    patch_with_gravity(model)
    assert any(name.startswith("mit.") for name in gravity_status(model).layers)
    assert {config._attn_implementation for config in parts} == {"gravity"}
    unpatch_gravity(model)
    assert [config._attn_implementation for config in parts] == before


def test_a_module_that_never_asks_the_registry_is_not_taken_for_one_that_does():
    """It asks for an attribute of the registry, which is never there: always its own attention."""
    file = importlib.import_module("transformers.models.kosmos2_5.modeling_kosmos2_5")
    assert not routes_through_interface(file.Kosmos2_5VisionAttention)
    assert routes_through_interface(file.Kosmos2_5TextAttention)
    with pytest.raises(TypeError, match="Kosmos2_5VisionAttention"):
        patch_with_gravity(tiny_model("kosmos_2_5_vision_model", 0))


def test_a_host_with_a_loader_of_its_own_is_loaded_and_its_gaps_are_seen(tmp_path):
    model = patch_with_gravity(tiny_model(needs("jev"), 0))
    with torch.no_grad():
        for module in gravity_modules(model).values():
            module.mass_log.add_(0.25)
    model.save_pretrained(tmp_path)
    again = load_gravity_model(tmp_path)
    assert type(again) is type(model)
    assert all(torch.equal(x, again.state_dict()[n]) for n, x in model.state_dict().items())

    (file,) = tmp_path.glob("*.safetensors")
    tensors = load_file(file)
    kept = {name: x for name, x in tensors.items() if not name.endswith("mass_log")}
    assert len(kept) < len(tensors)
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(ValueError, match="expected gravity tensors for every converted layer"):
        load_gravity_model(tmp_path)


def test_batches_in_which_nothing_is_seen_teach_nothing_and_say_so():
    model = patch_with_gravity(tiny_host("bert", num_hidden_layers=1))
    inputs = tiny_inputs("bert")
    inputs["attention_mask"] = torch.zeros_like(inputs["attention_mask"])
    with pytest.raises(ValueError, match="their masks hide everything from this module"):
        calibrate(model, [inputs], progress=False)


def test_a_class_that_transformers_names_but_does_not_export_is_patched_and_not_saved(tmp_path):
    model = tiny_model(needs("voxtral_realtime_text"), 0)
    if hasattr(importlib.import_module("transformers"), type(model).__name__):
        pytest.skip("this transformers exports it")
    patch_with_gravity(model)
    assert gravity_status(model).layers
    with pytest.raises(ValueError, match="is not part of transformers"):
        model.save_pretrained(tmp_path)


@pytest.mark.parametrize("layers", [None, (0,)])
def test_a_host_that_makes_no_mask_and_is_causal_stays_causal(layers):
    """Moshi's depth decoder leaves it to `is_causal`, in converted and in other modules."""
    model = tiny_model(needs("moshi_depth"))
    inputs = tiny_inputs_of(model)
    patch_with_gravity(model, GravityConfig(layers=layers))
    changed = {name: tensor.clone() for name, tensor in inputs.items()}
    changed["input_ids"][:, -1] = (changed["input_ids"][:, -1] + 1) % 5
    with torch.inference_mode():
        before, after = (main_output(model(**x)) for x in (inputs, changed))
    assert not torch.equal(before[:, -1], after[:, -1])
    torch.testing.assert_close(before[:, :-1], after[:, :-1])
