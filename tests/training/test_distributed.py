"""Two processes compute what one does, and save it whole."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_within_budget
from hosts import logits, tiny_host, tiny_inputs
from safetensors.torch import load_file
from training import two_processes as cases

from gravity_hf import gravity_param_groups, load_gravity_adapter, load_gravity_model
from gravity_hf.layers.parameters import GravityParameters
from gravity_hf.training.distributed import save_whole, shard_gravity

TIME_LIMIT = 240  # seconds; a collective that one process never joins would wait for ever
ADAPTER = "adapter_model.safetensors"
# Sums in another order; Adam's first steps divide gradients near 0 by themselves.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder that two processes have written, and `results.json` in it, read."""
    folder = tmp_path_factory.mktemp("two")
    script = Path(cases.__file__)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"),
        *("--master_addr", "127.0.0.1", "--master_port", str(port), str(script), str(folder)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=TIME_LIMIT
    )
    assert done.returncode == 0, done.stderr[-8000:]
    return folder, json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The same training in one process with the doubled batch, by granularity of the masses."""
    folder = tmp_path_factory.mktemp("one")
    return {
        mass_per: (cases.train(cases.adapted(mass_per), folder / mass_per), folder / mass_per)
        for mass_per in ("query_head", "layer")
    }


def assert_same_adapter(folder, other, **tolerance):
    ours, theirs = load_file(folder / ADAPTER), load_file(other / ADAPTER)
    assert ours.keys() == theirs.keys() and any("mass_log" in name for name in ours)
    assert all(t.dtype == torch.float32 for t in ours.values())
    for name, tensor in sorted(ours.items(), key=lambda item: "mass_log" not in item[0]):
        torch.testing.assert_close(tensor, theirs[name], msg=lambda m, n=name: f"{n}: {m}",
                                   **tolerance)  # fmt: skip


@pytest.mark.parametrize("strategy, mass_per", [("ddp", "query_head"), ("fsdp2", "layer")])
def test_training_in_two_processes_equals_one_with_the_doubled_batch(strategy, mass_per, one, two):
    (alone, alone_folder), (folder, results) = one[mass_per], two
    together = results[strategy]
    assert together["strategy"] == {"ddp": "MULTI_CPU", "fsdp2": "FSDP"}[strategy]
    assert together["losses"] == pytest.approx(alone["losses"], rel=1e-5)
    start = alone_folder / "start"
    cases.adapted(mass_per).save_pretrained(start)
    with pytest.raises(AssertionError, match="mass_log"):
        assert_same_adapter(start, alone_folder / "final", **TOLERANCE)
    assert_same_adapter(folder / strategy / "final", alone_folder / "final", **TOLERANCE)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_masses_keep_their_learning_rate_and_are_all_trained(strategy, one, two):
    together, (alone, _) = two[1][strategy], one["query_head"]
    assert together["gravity_rate"] == alone["gravity_rate"] == pytest.approx(30 * cases.RATE)
    assert together["gravity_parameters"] == alone["gravity_parameters"] == 6
    assert together["mass_dtypes"] == ["torch.float32"]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(strategy, two):
    folder, results = two
    if strategy == "ddp" and not cases.RESUMES_DDP_ON_CPU:
        pytest.skip("this transformers cannot resume DDP on CPU processes")
    assert results[f"{strategy}-resumed"]["losses"] == results[strategy]["losses"]
    resumed = folder / f"{strategy}-resumed" / "final"
    assert_same_adapter(resumed, folder / strategy / "final", rtol=0.0, atol=0.0)


def test_masses_are_float32_in_forward_under_a_bfloat16_policy(two):
    seen = load_file(two[0] / "bfloat16-masses.safetensors")
    modules = dict(cases.adapted().named_modules())
    assert len(seen) == 3
    for name, mass in seen.items():
        assert torch.equal(mass, modules[name]().mass), name


def test_gradients_of_masses_under_a_bfloat16_policy_are_as_good_as_those_of_one_process(two):
    found = load_file(two[0] / "bfloat16-gradients.safetensors")
    exact, peer = mass_gradients(cases.adapted()), mass_gradients(rounded(cases.adapted()))
    assert len(exact) == 6
    for name in exact:
        assert_within_budget(name, found[name], exact[name], peer[name])


def mass_gradients(model):
    cases.loss_of(model, tiny_inputs("qwen2", batch=cases.BATCH)).backward()
    return {name: g for name, g in cases.gradients(model).items() if ".gravity." in name}


def rounded(model):
    """The model in bfloat16, masses aside."""
    gravity = [module for module in model.modules() if isinstance(module, GravityParameters)]
    states = [{name: t.clone() for name, t in module.state_dict().items()} for module in gravity]
    model.bfloat16()
    for module, state in zip(gravity, states, strict=True):
        module.float().load_state_dict(state)
    return model


def test_plain_fsdp2_equals_one_process_and_resumes_from_dcp_bit_for_bit(two, tmp_path):
    folder, _ = two
    model = cases.adapted()
    cases.steps(model, torch.optim.AdamW(gravity_param_groups(model, cases.RATE)), 0, 4)
    save_whole(model, tmp_path)
    assert_same_adapter(folder / "raw", tmp_path, **TOLERANCE)
    assert_same_adapter(folder / "raw-resumed", folder / "raw", rtol=0.0, atol=0.0)


def test_an_adapter_saved_by_two_processes_loads_whole_in_one(two):
    folder, _ = two
    loaded = load_gravity_adapter(tiny_host("qwen2"), folder / "raw").state_dict()
    live = load_file(folder / "raw-masses.safetensors")
    assert len(live) == 9  # masses, softenings and key radii of three layers
    for name, tensor in live.items():
        assert torch.equal(loaded[name], tensor), name


def test_a_whole_model_saved_by_two_processes_loads_in_one(two):
    expected, inputs = cases.base(), tiny_inputs("qwen2")
    loaded = load_gravity_model(two[0] / "whole")
    assert type(loaded) is type(expected)
    assert torch.equal(logits(loaded, inputs), logits(expected, inputs))


@pytest.mark.parametrize("case, message", [
    ("ram", "fsdp_cpu_ram_efficient_loading: expected false, got true"),
    ("checkpointing", "pass gradient_checkpointing=True"),
    ("order", "shard_gravity, then fully_shard"),
])  # fmt: skip
def test_what_would_lose_masses_is_refused_with_the_way_out(case, message, two):
    assert message in two[1]["refusals"][case]


def test_sharding_an_unpatched_model_is_refused():
    with pytest.raises(ValueError, match="expected a patched model, got Qwen2ForCausalLM"):
        shard_gravity(tiny_host("qwen2"))
