"""Two processes that share data, tensors or heads compute what one does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers import assert_within_budget
from hosts import logits, tiny_host, tiny_inputs
from integration import parallel_ranks as cases
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from gravity_hf import GravityConfig, calibrate, load_gravity_model, patch_with_gravity

# Sums over processes and halves of a batch come in another order.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}


def save_models(folder):
    """The models that the processes load, by the names that they know."""
    shape = {"vocab_size": 98}  # some versions of transformers split only even vocabularies
    for name, (family, _) in cases.SPLIT.items():
        mass_per = "query_head" if name == "gathered" else name
        model = patch_with_gravity(tiny_host(family, **shape), GravityConfig(mass_per=mass_per))
        calibrate(model, [tiny_inputs(family)], progress=False)
        model.save_pretrained(folder / name)
    tiny_host("qwen2", **shape).save_pretrained(folder / "host")
    uneven = patch_with_gravity(tiny_host("qwen2", num_key_value_heads=3, **shape))
    uneven.save_pretrained(folder / "uneven")


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder that two processes have written, and `results.json` in it, read."""
    folder = tmp_path_factory.mktemp("two")
    save_models(folder)
    return folder, cases.run_in_two(Path(cases.__file__), folder)


def assert_same(found, expected):
    """The same names, masses among them, and the same numbers."""
    assert found.keys() == expected.keys() and any("mass_log" in name for name in found)
    for name, tensor in expected.items():
        torch.testing.assert_close(
            found[name], tensor, msg=lambda m, n=name: f"{n}: {m}", **TOLERANCE
        )


def read(folder, name):
    return load_file(folder / f"{name}.safetensors")


def test_ddp_averages_the_gradients_of_masses_and_steps_like_one_process(two):
    folder, results = two
    assert results["ddp"]["masses_agree"]
    start = load_gravity_model(folder / "kv_head").state_dict()
    found, after = cases.stepped(load_gravity_model(folder / "kv_head"), cases.inputs_of())
    assert_same(read(folder, "ddp-gradients"), found)
    assert_same(read(folder, "ddp-stepped"), after)
    masses = [name for name in after if name.endswith("mass_log")]
    assert len(masses) == 3 and not any(torch.equal(after[n], start[n]) for n in masses)


def test_fsdp2_shards_float32_masses_beside_bfloat16_weights_and_gives_equal_numbers(two):
    folder, results = two
    assert results["fsdp2"] == {"local_masses": [3, 3], "dtype": "torch.float32"}
    model = load_gravity_model(folder / "query_head", dtype=torch.bfloat16)
    seen = cases.masses_in_forward(model)
    expected = logits(model, cases.inputs_of())
    assert torch.equal(read(folder, "fsdp2-logits")["logits"], expected)
    whole = read(folder, "fsdp2-masses")
    assert len(whole) == 3
    for i, mass in enumerate(seen):
        assert torch.equal(whole[str(i)], mass)


def test_an_fsdp2_step_on_bfloat16_weights_is_as_good_as_that_of_one_process(two):
    folder, _ = two
    exact, after = cases.stepped(load_gravity_model(folder / "query_head"), cases.inputs_of())
    half = load_gravity_model(folder / "query_head", dtype=torch.bfloat16)
    peer, peer_after = cases.stepped(half, cases.inputs_of())
    found, found_after = read(folder, "fsdp2-gradients"), read(folder, "fsdp2-stepped")
    names = [name for name in exact if ".gravity." in name]
    assert len(names) == 6
    for name in names:
        assert_within_budget(name, found[name], exact[name], peer[name])
        assert_within_budget(name, found_after[name], after[name], peer_after[name])


def test_what_fsdp2_saves_is_whole_and_loads_in_one_process(two):
    folder, _ = two
    live = read(folder, "fsdp2-stepped")
    loaded = load_gravity_model(folder / "fsdp2", dtype="auto").state_dict()
    assert loaded.keys() == live.keys()
    for name, tensor in live.items():
        assert torch.equal(loaded[name], tensor), name
        expected = torch.float32 if ".gravity." in name else torch.bfloat16
        assert tensor.dtype == expected, name


def test_a_model_that_transformers_shards_on_load_keeps_float32_masses(two):
    folder, results = two
    if not cases.SHARDS_TWO_DTYPES:
        pytest.skip("this transformers cannot shard parameters of two dtypes")
    assert results["transformers"] == {"placed": "DTensor", "dtypes": ["torch.float32"]}
    model = load_gravity_model(folder / "query_head", dtype=torch.bfloat16)
    expected = logits(model, cases.inputs_of())
    assert torch.equal(read(folder, "loaded-logits")["logits"], expected)


@pytest.mark.parametrize("name", cases.SPLIT)
def test_tensor_parallel_processes_attend_with_the_masses_of_their_own_heads(name, two):
    folder, results = two
    family, heads = cases.SPLIT[name]
    assert results["split"][name]["heads"] == [[heads] * 3] * 2
    model = load_gravity_model(folder / name)
    expected = logits(model, cases.inputs_of(family))
    torch.testing.assert_close(read(folder, f"split-{name}-logits")["logits"], expected,
                               **TOLERANCE)  # fmt: skip
    ids = model.generate(**cases.inputs_of(family), **cases.GREEDY)
    assert torch.equal(read(folder, f"split-{name}-ids")["ids"], ids)


@pytest.mark.parametrize("name", cases.SPLIT)
def test_tensor_parallel_masses_are_trained_by_the_heads_of_all_processes(name, two):
    folder, results = two
    assert results["split"][name]["masses_agree"]
    inputs = cases.inputs_of(cases.SPLIT[name][0])
    found, after = cases.stepped(load_gravity_model(folder / name), inputs)
    assert_same(read(folder, f"split-{name}-gradients"), found)
    assert_same(read(folder, f"split-{name}-stepped"), after)


@pytest.mark.parametrize("name", cases.SPLIT)
def test_a_tensor_parallel_model_saves_the_checkpoint_of_one_process(name, two):
    folder, _ = two
    inputs = cases.inputs_of(cases.SPLIT[name][0])
    loaded = AutoModelForCausalLM.from_pretrained(folder / f"split-{name}")
    live = read(folder, f"split-{name}-stepped")
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, live[key]), key
    assert (folder / f"split-{name}" / "modeling_gravity.py").exists()
    before = logits(load_gravity_model(folder / name), inputs)
    assert not torch.equal(logits(loaded, inputs), before)


@pytest.mark.parametrize("case, message", [
    ("patch", "RuntimeError: patch_with_gravity: expected a whole model"),
    ("calibrate", "RuntimeError: calibrate: expected a whole model"),
    ("uneven", "ValueError: tensor parallelism: key_value_heads: expected a multiple of tp_size 2"),
])  # fmt: skip
def test_what_tensor_parallel_processes_cannot_do_is_refused(case, message, two):
    assert message in two[1]["refusals"][case]
