"""patch, unpatch, status: one object, all checks first, undone bit for bit."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import transformers
from hosts import FAMILIES, PECULIAR, logits, tiny_host, tiny_inputs

from gravity_hf import (
    GravityConfig,
    calibrate,
    gravity_status,
    patch_with_gravity,
    unpatch_gravity,
)
from gravity_hf.integration.hosts import gravity_modules
from gravity_hf.ops.api import explain_implementation


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_patched_and_unpatched_bit_for_bit(family):
    model, inputs = tiny_host(family), tiny_inputs(family)
    before, state = logits(model, inputs), copy.deepcopy(model.state_dict())
    config, cls = copy.deepcopy(model.config), type(model)

    assert patch_with_gravity(model) is model
    assert len(gravity_modules(model)) == 3
    assert (logits(model, inputs) - before).abs().max() > 1e-3

    assert unpatch_gravity(model) is model
    assert type(model) is cls and model.config.to_dict() == config.to_dict()
    assert model.config._attn_implementation == config._attn_implementation
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[key], state[key]) for key in state)
    assert torch.equal(logits(model, inputs), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_large_softness_gives_the_host_again(family):
    model, inputs = tiny_host(family), tiny_inputs(family)
    before = logits(model, inputs)
    patch_with_gravity(model)
    bare = (logits(model, inputs) - before).abs().max()
    calibrate(model, [inputs], softness=256.0)
    after = (logits(model, inputs) - before).abs().max()
    assert after < 0.02 * before.abs().max() and after < 0.1 * bare


@pytest.mark.parametrize("peculiarity", PECULIAR)
def test_hosts_with_something_of_their_own_come_back_at_a_large_softness(peculiarity):
    model, inputs = tiny_host(peculiarity), tiny_inputs(peculiarity)
    before = logits(model, inputs)
    patch_with_gravity(model)
    bare = (logits(model, inputs) - before).abs().max()
    calibrate(model, [inputs], softness=256.0)
    after = (logits(model, inputs) - before).abs().max()
    assert bare > 0 and after < 0.1 * bare and after < 0.02 * before.abs().max()
    assert torch.equal(logits(unpatch_gravity(model), inputs), before)


def test_patching_twice_with_the_same_settings_changes_nothing():
    model = tiny_host("qwen2")
    patch_with_gravity(model, GravityConfig(mass_init=0.7))
    modules = list(gravity_modules(model).values())
    patch_with_gravity(model, GravityConfig(mass_init=0.7))
    assert all(a is b for a, b in zip(modules, gravity_modules(model).values(), strict=True))


def test_patching_twice_with_other_settings_names_both():
    model = patch_with_gravity(tiny_host("qwen2"))
    with pytest.raises(RuntimeError, match=r"epsilon=0\.1.*epsilon=0\.5.*unpatch_gravity"):
        patch_with_gravity(model, GravityConfig(epsilon=0.5))


def test_no_layers_is_the_host_bit_for_bit():
    model, inputs = tiny_host("bert"), tiny_inputs("bert")
    before = logits(model, inputs)
    patch_with_gravity(model, GravityConfig(layers=()))
    assert torch.equal(logits(model, inputs), before)


def test_layers_leaves_the_others_on_dot_product():
    model, inputs = tiny_host("qwen2"), tiny_inputs("qwen2")
    hidden = {"output_hidden_states": True}
    with torch.no_grad():
        host = model(**inputs, **hidden).hidden_states
        patch_with_gravity(model, GravityConfig(layers=(2,)))
        patched = model(**inputs, **hidden).hidden_states
    torch.testing.assert_close(patched[2], host[2], rtol=1e-5, atol=1e-5)
    assert (patched[3] - host[3]).abs().max() > 1e-3
    status = gravity_status(model)
    assert status.layers == ("model.layers.2.self_attn",) and len(status.skipped) == 2


def test_layers_beyond_the_model_are_refused_before_any_change():
    model = tiny_host("qwen2")
    with pytest.raises(ValueError, match=r"indices below 3.*\[7\]"):
        patch_with_gravity(model, GravityConfig(layers=(0, 7)))
    assert type(model) is transformers.Qwen2ForCausalLM and not gravity_modules(model)


@pytest.mark.parametrize("granularity, count", [("query_head", 6), ("kv_head", 2), ("layer", 1)])
def test_mass_granularity(granularity, count):
    model, inputs = tiny_host("qwen2"), tiny_inputs("qwen2")
    patch_with_gravity(model, GravityConfig(mass_per=granularity))
    calibrate(model, [inputs])
    assert {m.mass_log.numel() for m in gravity_modules(model).values()} == {count}
    assert logits(model, inputs).isfinite().all()


SMALL = {"vocab_size": 97, "hidden_size": 32}


@pytest.mark.parametrize(
    "model_class, config",
    [
        ("BloomForCausalLM", {**SMALL, "n_layer": 2, "n_head": 4}),
        ("FalconForCausalLM", {**SMALL, "num_hidden_layers": 2, "num_attention_heads": 4}),
        (
            "GPTNeoForCausalLM",
            {**SMALL, "num_layers": 2, "num_heads": 4, "attention_types": [[["global"], 2]]},
        ),
        ("OpenAIGPTLMHeadModel", {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4}),
        (
            "DebertaV2Model",
            {**SMALL, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48},
        ),
        ("MambaForCausalLM", {**SMALL, "num_hidden_layers": 2}),
    ],
)
def test_an_architecture_out_of_reach_is_refused_by_name(model_class, config):
    """F7: transformers itself would only log a warning and go on with dot products."""
    cls = getattr(transformers, model_class)
    model = cls(cls.config_class(**config))
    with pytest.raises(TypeError, match=f"{model_class} cannot be patched"):
        patch_with_gravity(model)
    assert type(model) is cls and model.config._attn_implementation != "gravity"


def test_a_tower_out_of_reach_keeps_its_own_attention():
    """GIT's text tower has a class for each attention name; its vision tower takes any."""
    tower = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
             "num_attention_heads": 4}  # fmt: skip
    config = transformers.GitConfig(
        vision_config={**tower, "image_size": 16, "patch_size": 8}, vocab_size=97, **tower
    )
    model = transformers.GitForCausalLM(config).eval()
    inputs = {**tiny_inputs("vit"), "input_ids": tiny_inputs("qwen2")["input_ids"]}
    before = logits(model, inputs)
    implementations = [part._attn_implementation for part in (config, config.vision_config)]
    patch_with_gravity(model)
    assert len(gravity_modules(model)) == 2 and len(gravity_status(model).skipped) == 2
    assert not torch.equal(logits(model, inputs), before)
    unpatch_gravity(model)
    assert torch.equal(logits(model, inputs), before)
    after = [part._attn_implementation for part in (model.config, model.config.vision_config)]
    assert after == implementations


def test_attention_between_blocks_of_layers_is_not_a_site():
    """Its heads are positions: a mass for each could not be."""
    from gravity_hf.integration.sites import routes_through_interface

    file = pytest.importorskip("transformers.models.inkling2.modeling_inkling2")
    assert routes_through_interface(file.Inkling2FullAttention)
    assert not routes_through_interface(file.Inkling2BlockAttentionResidual)


def test_the_registered_name_is_special_to_nobody():
    """F14: flash, sdpa, flex_attention, a slash or a colon in it would change what it means."""
    from transformers.utils.generic import is_flash_attention_requested

    from gravity_hf.integration.attention import ATTENTION_NAME

    assert ATTENTION_NAME == "gravity"
    assert not is_flash_attention_requested(requested_attention_implementation=ATTENTION_NAME)


def test_an_implementation_of_the_host_s_own_choice_comes_back():
    model = tiny_host("qwen2")
    model.set_attn_implementation("eager")
    unpatch_gravity(patch_with_gravity(model))
    assert model.config._attn_implementation == "eager"


def test_both_towers_of_a_composite_model_are_patched_and_restored():
    tower = {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2,
             "num_attention_heads": 4}  # fmt: skip
    config = transformers.CLIPConfig(
        text_config={**tower, "vocab_size": 97, "eos_token_id": 2},
        vision_config={**tower, "image_size": 16, "patch_size": 4},
    )
    model = transformers.CLIPModel(config).eval()
    inputs = {**tiny_inputs("vit"), "input_ids": tiny_inputs("qwen2")["input_ids"]}
    with torch.no_grad():
        before = model(**inputs).logits_per_image
        patch_with_gravity(model)
        assert len(gravity_modules(model)) == 4
        assert not torch.equal(model(**inputs).logits_per_image, before)
        unpatch_gravity(model)
        assert torch.equal(model(**inputs).logits_per_image, before)
    parts = (model.config, model.config.text_config, model.config.vision_config)
    assert {part._attn_implementation for part in parts} == {"sdpa"}


def test_lifted_keys_without_data_are_refused():
    with pytest.raises(ValueError, match=r"calibrate\(model, batches\)"):
        patch_with_gravity(tiny_host("qwen2"), GravityConfig(distance="lifted"))


def test_a_plain_module_is_refused():
    with pytest.raises(TypeError, match="expected a transformers PreTrainedModel, got Linear"):
        patch_with_gravity(torch.nn.Linear(2, 2))


def test_a_compiled_model_is_refused_with_the_right_order():
    model = torch.compile(tiny_host("qwen2"), backend="eager")
    with pytest.raises(RuntimeError, match="load, patch_with_gravity, LoRA, then compile"):
        patch_with_gravity(model)


def test_unpatching_an_unpatched_model_is_refused():
    with pytest.raises(RuntimeError, match="Qwen2ForCausalLM is not patched"):
        unpatch_gravity(tiny_host("qwen2"))


def test_another_attention_on_gravity_weights_is_refused():
    model = patch_with_gravity(tiny_host("qwen2"))
    with pytest.raises(ValueError, match="unpatch_gravity"):
        model.set_attn_implementation("sdpa")


def test_status_tells_what_is_patched_and_how():
    model = tiny_host("qwen2")
    assert "not patched (sdpa attention)" in str(gravity_status(model))
    patch_with_gravity(model, GravityConfig(implementation="chunked"))
    status = gravity_status(model)
    assert status.patched and status.implementation == "chunked" and status.parameters == 18
    assert status.layers == tuple(f"model.layers.{i}.self_attn" for i in range(3))
    assert "law force, distance euclidean, not calibrated" in str(status)
    assert "implementation chunked: as the settings name it" in str(status)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_status_tells_what_auto_means_where_the_model_is(device):
    model = patch_with_gravity(tiny_host("qwen2").to(device, torch.bfloat16))
    status = gravity_status(model)
    expected = explain_implementation(torch.device(device), torch.bfloat16)
    assert (status.implementation, status.reason) == expected
    assert status.config.implementation == "auto" and status.reason in str(status)


@pytest.mark.parametrize("family", ["bert", "vit"])
def test_no_attention_is_reported_as_skipped_when_all_is_converted(family):
    assert gravity_status(patch_with_gravity(tiny_host(family))).skipped == ()


def test_hidden_states_and_attentions_are_still_recorded():
    model, inputs = patch_with_gravity(tiny_host("qwen2")), tiny_inputs("qwen2")
    with torch.no_grad():
        output = model(**inputs, output_hidden_states=True)
    assert len(output.hidden_states) == 4


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_of_a_patched_model_are_patched_and_unpatch(duplicate):
    model, inputs = tiny_host("qwen2"), tiny_inputs("qwen2")
    before = logits(model, inputs)
    after = logits(patch_with_gravity(model), inputs)
    twin = duplicate(model)
    assert torch.equal(logits(twin, inputs), after)
    assert torch.equal(logits(unpatch_gravity(twin), inputs), before)
    assert twin.config._attn_implementation == "sdpa"
    assert torch.equal(logits(model, inputs), after)


def test_two_models_of_one_class_do_not_touch_each_other():
    patched, other = tiny_host("qwen2"), tiny_host("qwen2")
    inputs = tiny_inputs("qwen2")
    before = logits(other, inputs)
    patch_with_gravity(patched)
    assert torch.equal(logits(other, inputs), before)
    assert other.config.model_type == "qwen2"


def test_two_models_of_one_config_object_are_refused_before_anything_changes():
    first = tiny_host("qwen2")
    second = type(first)(first.config)
    patch_with_gravity(first)
    with pytest.raises(ValueError, match=r"copy.deepcopy\(config\)"):
        patch_with_gravity(second)
    assert gravity_modules(second) == {} and type(second).__name__ == "Qwen2ForCausalLM"


@pytest.mark.parametrize("implementation", ["flex", "triton"])
def test_an_implementation_without_the_host_s_cap_is_refused_when_patching(implementation):
    model = tiny_host("a cap on the scores")
    with pytest.raises(ValueError, match="serves capped scores.*'auto' or 'chunked'"):
        patch_with_gravity(model, GravityConfig(implementation=implementation))
    assert not gravity_status(model).patched


def test_a_part_with_a_config_that_came_after_patching_does_not_stop_unpatching():
    model, inputs = tiny_host("qwen2"), tiny_inputs("qwen2")
    before = logits(model, inputs)
    patch_with_gravity(model)
    model.value_head = tiny_host("bert")
    unpatch_gravity(model)
    assert torch.equal(logits(model, inputs), before)
