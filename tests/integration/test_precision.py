"""Half precision costs gravity no more than it costs its host; masses stay float32."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers import assert_within_budget
from hosts import logits, tiny_host, tiny_inputs
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gravity_hf import GravityConfig, calibrate, load_gravity_model, patch_with_gravity
from gravity_hf.integration.hosts import gravity_modules

HALF = [torch.float16, torch.bfloat16]
CASES = [("qwen2", "force"), ("gemma", "power"), ("gpt2", "force"), ("vit", "power")]


def gravity_host(family, **settings):
    model = patch_with_gravity(tiny_host(family), GravityConfig(**settings))
    calibrate(model, [tiny_inputs(family)], progress=False)
    return model


def outputs(model, family):
    """Logits; pixels come in the dtype of the weights, as a processor makes them."""
    inputs = tiny_inputs(family)
    return logits(
        model,
        {name: t.to(model.dtype) if t.is_floating_point() else t for name, t in inputs.items()},
    )


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request, tmp_path_factory):
    """A family's host and the gravity model made from it, on disk and in memory, each with its
    outputs in float64, gravity's by the reference."""
    family, law = request.param
    folder = tmp_path_factory.mktemp(family)
    host, model = tiny_host(family), gravity_host(family, law=law)
    host.save_pretrained(folder / "host")
    model.save_pretrained(folder / "gravity")
    exact_host = outputs(copy.deepcopy(host).double(), family)
    exact = outputs(gravity_host(family, law=law, implementation="reference").double(), family)
    assert (exact - exact_host).abs().max() > 0.01 * exact.abs().max()  # gravity ran
    return family, folder, (host, exact_host), (model, exact)


def peer(found, exact_host, exact):
    """What the host's error in a dtype would make of gravity's output."""
    return exact + (found.double() - exact_host)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_half_precision_load_errs_as_little_as_its_host(case, dtype):
    family, folder, (host, exact_host), (_, exact) = case
    loaded = load_gravity_model(folder / "gravity", dtype=dtype)
    assert loaded.dtype == dtype
    loaded_host = type(host).from_pretrained(folder / "host", dtype=dtype)
    budget = peer(outputs(loaded_host, family), exact_host, exact)
    assert_within_budget(family, outputs(loaded, family), exact, budget)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_model_moved_to_half_precision_errs_as_little_as_its_host(case, dtype):
    family, _, (host, exact_host), (model, exact) = case
    moved = copy.deepcopy(model).to(dtype)
    budget = peer(outputs(copy.deepcopy(host).to(dtype), family), exact_host, exact)
    assert_within_budget(family, outputs(moved, family), exact, budget)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_errs_as_little_as_for_its_host(case, dtype):
    family, _, (host, exact_host), (model, exact) = case
    with torch.autocast("cpu", dtype):
        found, of_host = outputs(model, family), outputs(host, family)
    assert_within_budget(family, found, exact, peer(of_host, exact_host, exact))


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_masses_stay_float32_whatever_is_done_to_a_model(dtype, tmp_path):
    model = gravity_host("qwen2")
    expected = states(model)
    assert_states(model.to(dtype), expected)
    model.save_pretrained(tmp_path)
    on_disk = load_file(tmp_path / "model.safetensors")
    assert on_disk["model.embed_tokens.weight"].dtype == dtype
    for name, tensor in on_disk.items():
        if ".gravity." in name:
            assert torch.equal(tensor, expected[name]), name
    assert_states(AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto"), expected)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_half_precision_host_gets_float32_masses_as_good_as_its_queries(dtype):
    """Calibration of the rounded host: masses are those of the exact host, give or take what the
    rounding of its queries and keys does to their lengths."""
    model = patch_with_gravity(tiny_host("qwen2").to(dtype))
    calibrate(model, [tiny_inputs("qwen2")], progress=False)
    found, exact = states(model), states(gravity_host("qwen2"))
    for name, tensor in found.items():
        assert tensor.dtype == torch.float32, name
        torch.testing.assert_close(tensor, exact[name], rtol=0.02, atol=0.0)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_masses_of_a_half_precision_model_train_in_float32(dtype):
    inputs, exact = tiny_inputs("qwen2"), gravity_host("qwen2").double()
    model = gravity_host("qwen2").to(dtype)
    for each in (exact, model):
        each(**inputs, labels=inputs["input_ids"]).loss.backward()
    for name, module in gravity_modules(model).items():
        gradient = module.mass_log.grad
        wanted = gravity_modules(exact)[name].mass_log.grad
        assert gradient.dtype == torch.float32
        cosine = torch.nn.functional.cosine_similarity(gradient.double(), wanted, dim=0)
        assert cosine > 0.95, name


def states(model):
    return {name: t.clone() for name, t in model.state_dict().items() if ".gravity." in name}


def assert_states(model, expected):
    found = states(model)
    assert found.keys() == expected.keys() and len(found) == 9
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
