"""With gravity_hf imported the same holds: patched and loaded models run gravity or nothing."""

from __future__ import annotations

import copy
import json

import peft
import pytest
import torch
import transformers
from hosts import logits, tiny_host, tiny_inputs
from hub.older import save_older
from hub.without_library import NAMES
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

from gravity_hf import (
    GravityConfig,
    calibrate,
    gravity_lora,
    gravity_serving,
    load_gravity_adapter,
    load_gravity_model,
    patch_with_gravity,
    unpatch_gravity,
)
from gravity_hf.hub.checks import check_export
from gravity_hf.integration.guards import EXPORT_NAME, WEIGHTS_KEY

INPUTS = tiny_inputs("qwen2")


def host():
    return tiny_host("qwen2", num_hidden_layers=2)


def patched(**settings):
    return patch_with_gravity(host(), GravityConfig(**settings))


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export")
    patched().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def older(export, tmp_path_factory):
    return save_older(export, tmp_path_factory.mktemp("older") / "export")


@pytest.fixture
def runtime():
    """A runtime's own attention, registered under its own name."""

    def attend(*args, **kwargs):
        raise AssertionError("a runtime's attention was called on a gravity model")

    AttentionInterface.register("runtime", attend)
    yield "runtime"
    del AttentionInterface._global_mapping["runtime"]


@pytest.mark.parametrize("name", ["sdpa", "eager", "runtime"])
@pytest.mark.parametrize("made", ["patched", "loaded", "copied", "under LoRA", "partly converted"])
def test_another_attention_in_the_config_stops_the_next_call(made, name, export, runtime):
    model = {
        "patched": patched,
        "loaded": lambda: AutoModelForCausalLM.from_pretrained(export),
        "copied": lambda: copy.deepcopy(patched()),
        "under LoRA": lambda: gravity_lora(patched(), r=2),
        "partly converted": lambda: patched(layers=(0,)),
    }[made]()
    expected = logits(model.eval(), INPUTS)
    model.config._attn_implementation = name
    for part in (model, model.get_decoder()):
        with pytest.raises(ValueError, match=f"expected config._attn_implementation .*{name!r}"):
            part(**INPUTS)
    model.config._attn_implementation = "gravity"
    assert torch.equal(logits(model, INPUTS), expected)


def test_a_compiled_model_stops_too():
    model = patched()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    assert torch.equal(logits(compiled, INPUTS), logits(model, INPUTS))
    model.config._attn_implementation = "sdpa"
    with pytest.raises(Exception, match="expected config._attn_implementation|Observed exception"):
        compiled(**INPUTS)


def test_a_served_model_goes_on_and_no_other_under_the_same_name():
    model, other = patched(), patched()
    expected = logits(model, INPUTS)
    with gravity_serving(model):
        assert torch.equal(logits(model, INPUTS), expected)
        other.config._attn_implementation = model.config._attn_implementation
        with pytest.raises(ValueError, match=r"got 'paged\|eager'"):
            other(**INPUTS)


def test_an_unpatched_host_takes_any_attention_again(export):
    for model in (patched(), AutoModelForCausalLM.from_pretrained(export)):
        unpatch_gravity(model)
        assert not any(module._forward_pre_hooks for module in model.modules())
        model.set_attn_implementation("eager")
        torch.testing.assert_close(logits(model, INPUTS), logits(host(), INPUTS))


def test_a_runtime_s_name_in_the_config_of_a_part_is_refused(tmp_path, runtime):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4}
    small = {**sizes, "num_hidden_layers": 1}
    text = {**small, "vocab_size": 97, "max_position_embeddings": 32, "bos_token_id": 1}
    vision = {**small, "image_size": 16, "patch_size": 8}
    config = transformers.CLIPConfig(text_config=text, vision_config=vision)
    patch_with_gravity(transformers.CLIPModel(config)).save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    transformers.AutoModel.from_config(loaded)
    loaded.get_text_config()._attn_implementation = runtime
    with pytest.raises(ValueError, match="expected attn_implementation 'gravity'.*'runtime'"):
        transformers.AutoModel.from_config(loaded)
    with pytest.raises(ValueError, match="gravity-only"):
        transformers.CLIPTextModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("chosen", [{}, *({"attn_implementation": x} for x in NAMES)])
def test_the_host_s_own_class_refuses_an_export(export, chosen):
    host = transformers.Qwen2ForCausalLM
    with pytest.raises(ValueError, match="gravity-only: load by an Auto class"):
        host.from_pretrained(export, **chosen)
    config = transformers.Qwen2Config.from_pretrained(export, **chosen)
    with pytest.raises(ValueError, match="gravity-only: load by an Auto class"):
        host.from_pretrained(export, config=config)


def test_the_host_s_own_class_refuses_a_quantised_export(export, tmp_path):
    quantization = pytest.importorskip("torchao.quantization")
    int8 = transformers.TorchAoConfig(quantization.Int8WeightOnlyConfig(version=2))
    model = AutoModelForCausalLM.from_pretrained(export, quantization_config=int8)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="gravity-only: load by an Auto class"):
        transformers.Qwen2ForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, INPUTS), logits(model, INPUTS))


def test_no_config_in_memory_names_a_file_of_weights(export):
    """A config that did would be refused by gravity's own classes as by a host's."""
    file = export / "config.json"
    read = AutoConfig.from_pretrained(export)
    for config in (patched().config, read, type(read).from_json_file(file), copy.deepcopy(read)):
        assert not hasattr(config, WEIGHTS_KEY)
        assert WEIGHTS_KEY not in config.to_dict()
    assert json.loads(file.read_text())[WEIGHTS_KEY] == EXPORT_NAME


def test_an_unpatched_host_is_saved_without_refusals(export, tmp_path):
    unpatch_gravity(AutoModelForCausalLM.from_pretrained(export)).save_pretrained(tmp_path)
    transformers.Qwen2ForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")


def test_an_export_of_before_the_weights_had_a_name_loads_and_is_not_pushed(export, older):
    expected = logits(AutoModelForCausalLM.from_pretrained(export), INPUTS)
    assert torch.equal(logits(load_gravity_model(older), INPUTS), expected)
    check_export(export)
    with pytest.raises(ValueError, match=f"expected {WEIGHTS_KEY} .*saved by an older gravity_hf"):
        check_export(older)


def test_the_host_s_own_class_told_to_run_gravity_is_refused_at_its_first_call(older):
    """Masses have no place in it, so every module would be one that was left to dot products."""
    model = transformers.Qwen2ForCausalLM.from_pretrained(older, attn_implementation="gravity")
    with pytest.raises(ValueError, match="expected masses.*Load the checkpoint with an Auto class"):
        model(**INPUTS)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """An adapter with its base, calibrated masses and LoRA weights that are not zero."""
    root = tmp_path_factory.mktemp("adapter")
    host().save_pretrained(root / "base")
    base = patch_with_gravity(AutoModelForCausalLM.from_pretrained(root / "base"))
    calibrate(base, [INPUTS])
    model = gravity_lora(base, r=2).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    model.save_pretrained(root / "adapter")
    return root / "adapter", logits(model, INPUTS)


WAYS = {
    "PeftModel": lambda model, folder: peft.PeftModel.from_pretrained(model, folder),
    "PeftMixedModel": lambda model, folder: peft.PeftMixedModel.from_pretrained(model, folder),
    "load_adapter": lambda model, folder: (model.load_adapter(str(folder)), model)[1],
    "get_peft_model": lambda model, folder: peft.get_peft_model(
        model, peft.PeftConfig.from_pretrained(folder)
    ),
    "beside another adapter": lambda model, folder: peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj"])
    ).load_adapter(folder, "gravity"),
}


@pytest.mark.parametrize("way", WAYS)
def test_peft_refuses_an_unpatched_base_and_leaves_it_alone(way, adapter):
    model = host()
    expected = logits(model, INPUTS)
    with pytest.raises(RuntimeError, match="expected a patched base.*load_gravity_adapter"):
        WAYS[way](model, adapter[0])
    assert torch.equal(logits(model, INPUTS), expected)


@pytest.mark.parametrize(
    "load",
    [
        AutoModelForCausalLM.from_pretrained,
        lambda folder: peft.AutoPeftModelForCausalLM.from_pretrained(str(folder)),
    ],
    ids=["Auto class", "AutoPeftModel"],
)
def test_a_base_that_would_be_loaded_unpatched_is_refused(load, adapter):
    with pytest.raises(RuntimeError, match="expected a patched base.*load_gravity_model"):
        load(adapter[0])


def test_peft_refuses_a_base_that_is_patched_otherwise(adapter):
    with pytest.raises(ValueError, match="expected a base patched with"):
        peft.PeftModel.from_pretrained(patched(law="power"), adapter[0])


def patched_alike(folder):
    """The adapter's base as it was when the adapter was made, without the adapter's numbers."""
    return load_gravity_adapter(host(), folder).unload()


@pytest.mark.parametrize("way", ["PeftModel", "load_adapter"])
def test_peft_and_transformers_put_it_on_a_base_patched_alike(way, adapter):
    folder, expected = adapter
    model = WAYS[way](patched_alike(folder), folder).eval()
    assert torch.equal(logits(model, INPUTS), expected)


def test_what_peft_saves_again_loads_again(adapter, tmp_path):
    folder, expected = adapter
    peft.PeftModel.from_pretrained(patched_alike(folder), folder).save_pretrained(tmp_path)
    again = load_gravity_adapter(host(), tmp_path)
    assert torch.equal(logits(again, INPUTS), expected)
    assert peft.PeftConfig.from_pretrained(tmp_path).peft_type == peft.PeftType.LORA
