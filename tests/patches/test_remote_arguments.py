"""The file beside an export honours the arguments of attention calls, or refuses them by name."""

from __future__ import annotations

import pytest
import torch
import transformers
from gravity_hf._remote_code import modeling_gravity as remote
from hosts import tiny_host

from gravity_hf import GravityConfig, patch_with_gravity
from gravity_hf.integration.attention import gravity_attention_forward
from gravity_hf.integration.support import REFUSED_ARGUMENTS

LENGTH = 7


@pytest.fixture(scope="module")
def modules():
    """The first attention module converted for the library, the second left to dot products."""
    model = patch_with_gravity(tiny_host("qwen2"), GravityConfig(layers=(0,)))
    layers = model.model.layers
    ours, plain = layers[0].self_attn, layers[1].self_attn
    settings = {**model.config.gravity, "version": remote.VERSION}
    there = type(ours)(model.config, 0)
    there.gravity = remote.GravityParameters(settings, 6, 2)
    there.gravity.load_state_dict(ours.gravity.state_dict())
    return {"gravity": (ours, there), "dot product": (plain, plain)}


def heads(kv_heads=2):
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(2, h, LENGTH, 8, generator=generator) for h in (6, kv_heads, kv_heads)]


ARGUMENTS = {
    "a mask of heads": {"head_mask": torch.tensor([1.0, 0.0, 0.5, 1.0, 2.0, 0.0])},
    "raw padding": {"attention_mask": (torch.arange(LENGTH) > 2).long().expand(2, -1)},
    "keys that were chosen": {
        "indices": torch.tensor([0, 2, 5]).expand(2, LENGTH, -1),
        "attention_mask": torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool),
    },
    "as many choices as keys, most of them none": {
        "indices": torch.tensor([1, 3] + [-1] * (LENGTH - 2)).expand(2, LENGTH, -1),
        "attention_mask": torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool),
    },
}


def called(function, module, **arguments):
    mask = arguments.pop("attention_mask", None)
    options = {"is_causal": False, "scaling": 8**-0.5, **arguments}
    return function(module, *heads(), mask, **options)[0]


@pytest.mark.parametrize("law", ["gravity", "dot product"])
@pytest.mark.parametrize("case", ARGUMENTS)
def test_the_file_honours_what_the_library_does(case, law, modules):
    ours, there = modules[law]
    without = called(remote.gravity_attention_forward, there)
    result = called(remote.gravity_attention_forward, there, **ARGUMENTS[case])
    assert (result - without).abs().max() > 1e-3
    if "none" in case:
        few = {**ARGUMENTS[case], "indices": ARGUMENTS[case]["indices"][..., :2]}
        expected = called(remote.gravity_attention_forward, there, **few)
    else:
        expected = called(gravity_attention_forward, ours, **ARGUMENTS[case])
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", REFUSED_ARGUMENTS)
@pytest.mark.parametrize("law", ["gravity", "dot product"])
def test_what_the_library_refuses_the_file_refuses_by_name(name, law, modules):
    with pytest.raises(ValueError, match=f"`{name}`: .*Expected a call"):
        called(remote.gravity_attention_forward, modules[law][1], **{name: object()})


def test_masses_of_other_heads_are_refused(modules):
    with pytest.raises(ValueError, match=r"\(6, 2\), got \(6, 3\)"):
        remote.gravity_attention_forward(modules["gravity"][1], *heads(3), None)


def test_eager_attention_is_found_by_another_name_and_missed_by_name():
    from transformers.models.timesfm import modeling_timesfm

    module = modeling_timesfm.TimesFmAttention.__new__(modeling_timesfm.TimesFmAttention)
    found = remote._eager_attention_of(type(module))
    assert found is modeling_timesfm.simple_eager_attention_forward
    nowhere = torch.nn.Identity()
    with pytest.raises(ValueError, match=r"expected an eager_attention_forward .*head_mask"):
        called(remote.gravity_attention_forward, nowhere, head_mask=torch.ones(6))


def load_own(cls, *args, **kwargs):
    """A host's own loader, which hands out its model alone."""
    model = super(transformers.Qwen2ForCausalLM, cls).from_pretrained(*args, **kwargs)
    return model.eval()


def test_a_host_with_a_loader_of_its_own_loads_and_lacks_nothing_unnoticed(tmp_path, monkeypatch):
    import safetensors.torch

    model = patch_with_gravity(tiny_host("qwen2"))
    model.save_pretrained(tmp_path)
    monkeypatch.setattr(transformers.Qwen2ForCausalLM, "from_pretrained", classmethod(load_own))
    loaded = remote.GravityQwen2ForCausalLM.from_pretrained(tmp_path)
    name = "model.layers.0.self_attn.gravity.mass_log"
    assert torch.equal(loaded.state_dict()[name], model.state_dict()[name])
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del weights[name]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="expected gravity tensors"):
        remote.GravityQwen2ForCausalLM.from_pretrained(tmp_path)
