"""What is saved comes back, in full, or is refused: never a gravity model run as dot product."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch
import transformers
from hosts import logits, tiny_host, tiny_inputs
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from gravity_hf import (
    GravityConfig,
    calibrate,
    gravity_status,
    load_gravity_model,
    patch_with_gravity,
    unpatch_gravity,
)
from gravity_hf.integration.hosts import gravity_modules

HOSTS = [("qwen2", False), ("qwen2", True), ("llama", False), ("llama", True), ("gpt2", True),
         ("gpt2", False), ("bert", True), ("bert", False)]  # fmt: skip
AUTOS = {"bert": transformers.AutoModelForMaskedLM}


def saved_model(family, folder, law="force", **options):
    overrides = {"tie_word_embeddings": options.pop("tied")} if "tied" in options else {}
    model = patch_with_gravity(tiny_host(family, **overrides), GravityConfig(law=law))
    calibrate(model, [tiny_inputs(family)])
    model.save_pretrained(folder, **options)
    return model


@pytest.mark.parametrize("family, tied", HOSTS)
def test_a_saved_model_comes_back_bit_for_bit(family, tied, tmp_path):
    """F5, F11: transformers does not save the attention's name; tied weights need a dict."""
    model, inputs = saved_model(family, tmp_path, tied=tied), tiny_inputs(family)
    expected = logits(model, inputs)
    auto = AUTOS.get(family, AutoModelForCausalLM)
    for loaded in (auto.from_pretrained(tmp_path), load_gravity_model(tmp_path)):
        assert type(loaded) is type(model)
        assert torch.equal(logits(loaded, inputs), expected)
        assert gravity_status(loaded) == gravity_status(model)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == f"gravity_{family}"


@pytest.mark.parametrize("law", ["force", "power"])
def test_a_sharded_model_comes_back_bit_for_bit(law, tmp_path):
    model = saved_model("qwen2", tmp_path, law=law, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    inputs = tiny_inputs("qwen2")
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_partly_converted_models_come_back(tmp_path):
    model = patch_with_gravity(tiny_host("qwen2"), GravityConfig(layers=(1,), mass_per="kv_head"))
    model.save_pretrained(tmp_path)
    loaded, inputs = AutoModelForCausalLM.from_pretrained(tmp_path), tiny_inputs("qwen2")
    assert list(gravity_modules(loaded)) == ["model.layers.1.self_attn"]
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_a_host_saved_whole_with_one_part_patched_comes_back_as_gravity(tmp_path):
    inputs = tiny_inputs("qwen2")
    host = tiny_host("qwen2")
    patch_with_gravity(host.model)
    host.save_pretrained(tmp_path)
    for model in (load_gravity_model(tmp_path), AutoModelForCausalLM.from_pretrained(tmp_path)):
        assert type(model).__name__ == "GravityQwen2ForCausalLM"
        assert torch.equal(logits(model, inputs), logits(host, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gravity_tensors_stay_float32_in_half_precision_loads(dtype, tmp_path):
    model = saved_model("qwen2", tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert loaded.dtype == dtype
    pairs = zip(gravity_modules(model).values(), gravity_modules(loaded).values(), strict=True)
    for before, after in pairs:
        for key, tensor in before.state_dict().items():
            assert torch.equal(after.state_dict()[key], tensor), key
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype="auto")
    inputs = tiny_inputs("qwen2")
    assert torch.equal(logits(again, inputs), logits(loaded, inputs))


def test_every_auto_class_of_the_host_knows_the_gravity_type(tmp_path):
    saved_model("qwen2", tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path)).__name__ == "GravityQwen2Model"
    classifier = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert gravity_status(classifier).patched


def test_a_loaded_model_unpatches_to_its_host(tmp_path):
    host, inputs = tiny_host("qwen2"), tiny_inputs("qwen2")
    saved_model("qwen2", tmp_path)
    loaded = unpatch_gravity(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert type(loaded) is transformers.Qwen2ForCausalLM
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(logits(loaded, inputs), logits(host, inputs))


def test_a_reloaded_model_unpatched_and_saved_is_the_plain_host_on_disk(tmp_path):
    saved_model("qwen2", tmp_path / "gravity")
    loaded = unpatch_gravity(load_gravity_model(tmp_path / "gravity"))
    loaded.save_pretrained(tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["model_type"] == "qwen2" and config["architectures"] == ["Qwen2ForCausalLM"]
    assert not {"gravity", "auto_map"} & set(config)
    assert not (tmp_path / "plain" / "modeling_gravity.py").exists()


def test_dot_product_attention_on_a_gravity_checkpoint_is_refused(tmp_path):
    saved_model("qwen2", tmp_path)
    with pytest.raises(ValueError, match="expected attn_implementation 'gravity'.*'sdpa'"):
        AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")


def test_missing_gravity_tensors_are_refused(tmp_path):
    """F8: parameters missing from a checkpoint come back as uninitialised memory."""
    saved_model("qwen2", tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors["model.layers.1.self_attn.gravity.mass_log"]
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing, such as model\.layers\.1\.self_attn\.gravity"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_plain_host_loaded_with_a_gravity_class_is_refused(tmp_path):
    """F6: a checkpoint without masses must not become a gravity model by its class's name."""
    from gravity_hf.integration import hosts

    tiny_host("qwen2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="expected config.gravity"):
        hosts.GravityQwen2ForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"unknown": 1}, "unknown"),
        ({"version": 99}, "pip install -U"),
        ({"law": "x"}, "law"),
    ],
)
def test_settings_that_are_not_understood_are_refused(change, message, tmp_path):
    saved_model("qwen2", tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    config["gravity"].update(change)
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_hosts_whose_checkpoints_are_converted_on_load_come_back(tmp_path):
    config = transformers.MixtralConfig(
        vocab_size=97, hidden_size=48, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=6, num_key_value_heads=2, num_local_experts=3, initializer_range=0.2,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / "host")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "host")
    patch_with_gravity(model).save_pretrained(tmp_path / "gravity")
    inputs = tiny_inputs("qwen2")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "gravity")
    assert torch.equal(logits(loaded, inputs), logits(model, inputs))


def test_plain_transformers_refuses_a_gravity_checkpoint(tmp_path):
    """F9: under the host's own model_type it would run dot products without an error."""
    saved_model("qwen2", tmp_path)
    code = f"""
import sys
sys.modules["gravity_hf"] = None
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained({str(tmp_path)!r}, trust_remote_code=False)
except ValueError as error:
    print("refused:", error)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "refused:" in result.stdout, result.stderr
    assert "gravity_qwen2" in result.stdout or "trust_remote_code" in result.stdout


class OwnHost(transformers.Qwen2ForCausalLM):
    """A host that transformers cannot name."""


def test_a_host_from_outside_transformers_is_told_at_once_and_not_saved(tmp_path, monkeypatch):
    from gravity_hf.integration import patching

    said = []
    monkeypatch.setattr(patching.logger, "warning", said.append)
    model = OwnHost(tiny_host("qwen2").config).eval()
    inputs = tiny_inputs("qwen2")
    before = logits(model, inputs)
    patch_with_gravity(model)
    assert "OwnHost is not part of transformers" in said[0]
    with pytest.raises(ValueError, match="OwnHost is not part of transformers"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert torch.equal(logits(unpatch_gravity(model), inputs), before)
    assert type(model) is OwnHost


def test_the_config_alone_resolves_after_import(tmp_path):
    saved_model("qwen2", tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config).__name__ == "GravityQwen2Config"
    assert isinstance(config, transformers.Qwen2Config)


def test_disk_offloaded_models_compute_the_same(tmp_path):
    model, inputs = saved_model("qwen2", tmp_path), tiny_inputs("qwen2")
    device_map = {
        "model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu",
        "lm_head": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
        "model.layers.2": "disk",
    }  # fmt: skip
    loaded = AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    torch.testing.assert_close(logits(loaded, inputs), logits(model, inputs))
