"""DeepSpeed's ZeRO-3 in float32, by `deepspeed.initialize`: two processes compute what one does."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from hosts import logits, tiny_host, tiny_inputs
from integration import parallel_ranks as cases
from safetensors.torch import load_file

from gravity_hf import calibrate, load_gravity_model, patch_with_gravity


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The folder that two processes have written, and `results.json` in it, read."""
    # Not importorskip: DeepSpeed changes torch, and must stay out of this process.
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is not installed")
    folder = tmp_path_factory.mktemp("zero")
    model = patch_with_gravity(tiny_host("qwen2"))
    calibrate(model, [tiny_inputs("qwen2")], progress=False)
    model.save_pretrained(folder / "gravity")
    return folder, cases.run_in_two(Path(__file__).with_name("zero_ranks.py"), folder)


def test_zero3_gathers_the_masses_for_attention_and_gives_equal_numbers(two):
    folder, results = two
    # Partitioned between calls, whole in the six calls of two passes.
    assert results == {"local_masses": [0, 0, 0], "masses_in_forward": [6] * 6}
    expected = logits(load_gravity_model(folder / "gravity"), cases.inputs_of())
    torch.testing.assert_close(load_file(folder / "logits.safetensors")["logits"], expected)


def test_a_zero3_step_equals_that_of_one_process(two):
    folder, _ = two
    found, after = cases.stepped(load_gravity_model(folder / "gravity"), cases.inputs_of())
    for name, expected in (("gradients", found), ("stepped", after)):
        tensors = load_file(folder / f"{name}.safetensors")
        assert any("mass_log" in key for key in tensors)
        for key, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-4, atol=1e-5)
