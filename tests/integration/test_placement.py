"""A model whose tensors are placed by accelerate, on disk if need be, computes the same."""

from __future__ import annotations

import accelerate
import pytest
import torch
from hosts import logits, tiny_host, tiny_inputs
from transformers import AutoModelForCausalLM, Qwen2ForCausalLM

from gravity_hf import (
    calibrate,
    gravity_status,
    load_gravity_mass_log,
    load_gravity_model,
    patch_with_gravity,
    unpatch_gravity,
)
from gravity_hf.integration.hosts import gravity_modules

PARTS = ["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"]
LAYERS = [f"model.layers.{i}" for i in range(3)]
MAPS = {
    "one device": {"device_map": {"": "cpu"}},
    # Without GPUs, whose numbers are not bit for bit a CPU's.
    "auto": {"device_map": "auto", "max_memory": {"cpu": 10**9}},
    "auto, memory for a part": {"device_map": "auto", "max_memory": {"cpu": 200_000}},
    # The first parameter of the model is then nowhere between two calls.
    "all but the head on disk": {
        "device_map": {**dict.fromkeys([*PARTS, *LAYERS], "disk"), "lm_head": "cpu"}
    },
}
GREEDY = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The host and the gravity model made from it, on disk and in memory."""
    folder = tmp_path_factory.mktemp("plain")
    host, model = tiny_host("qwen2"), patch_with_gravity(tiny_host("qwen2"))
    calibrate(model, [tiny_inputs("qwen2")], progress=False)
    host.save_pretrained(folder / "host")
    model.save_pretrained(folder / "gravity")
    return folder, host, model


def placed(folder, where, offload):
    model = AutoModelForCausalLM.from_pretrained(folder, offload_folder=offload, **MAPS[where])
    is_offloaded = any(p.is_meta for p in model.parameters())
    assert is_offloaded == (where in ("auto, memory for a part", "all but the head on disk"))
    return model


def assert_same(model, expected):
    """Same numbers, same text, through gravity."""
    inputs, calls = tiny_inputs("qwen2"), []
    for module in gravity_modules(model).values():
        module.register_forward_hook(lambda *_: calls.append(1))
    assert torch.equal(logits(model, inputs), logits(expected, inputs))
    assert len(calls) == 3 and gravity_status(model).patched
    found = model.generate(**inputs, **GREEDY)
    assert torch.equal(found, expected.generate(**inputs, **GREEDY))


@pytest.mark.parametrize("where", MAPS)
def test_a_placed_host_is_patched_calibrated_saved_and_unpatched(where, plain, tmp_path):
    folder, host, expected = plain
    inputs = tiny_inputs("qwen2")
    model = placed(folder / "host", where, tmp_path / "offload")
    calibrate(patch_with_gravity(model), [inputs], progress=False)
    assert_same(model, expected)
    model.save_pretrained(tmp_path / "saved")
    assert_same(load_gravity_model(tmp_path / "saved"), expected)
    assert torch.equal(logits(unpatch_gravity(model), inputs), logits(host, inputs))
    assert type(model) is Qwen2ForCausalLM


@pytest.mark.parametrize("where", MAPS)
def test_a_placed_gravity_model_can_be_calibrated_again_and_saved(where, plain, tmp_path):
    folder, _, expected = plain
    model = placed(folder / "gravity", where, tmp_path / "offload")
    assert_same(model, expected)
    again = load_gravity_model(folder / "gravity")
    for each in (model, again):
        calibrate(each, [tiny_inputs("qwen2")], softness=8.0, progress=False)
    assert_same(model, again)
    model.save_pretrained(tmp_path / "saved")
    assert_same(load_gravity_model(tmp_path / "saved"), again)


@pytest.mark.parametrize("offload", ["cpu_offload", "disk_offload"])
@pytest.mark.parametrize("when", ["before patching", "after calibration"])
def test_offloading_hooks_change_no_number(when, offload, plain, tmp_path):
    _, _, expected = plain
    model = tiny_host("qwen2")
    arguments = (tmp_path,) if offload == "disk_offload" else ()

    def offloaded():
        device = torch.device("cpu")
        getattr(accelerate, offload)(model, *arguments, execution_device=device)
        assert next(model.parameters()).is_meta

    if when == "before patching":
        offloaded()
    calibrate(patch_with_gravity(model), [tiny_inputs("qwen2")], progress=False)
    if when == "after calibration":
        offloaded()
    assert_same(model, expected)


def test_masses_are_not_written_into_offloaded_tensors(tmp_path):
    model = patch_with_gravity(tiny_host("qwen2"))
    masses = {f"{name}.gravity_mass_log": torch.ones(6) for name in gravity_modules(model)}
    torch.save(masses, tmp_path / "gravity_mass_log.pt")
    model.save_pretrained(tmp_path / "gravity")
    loaded = placed(tmp_path / "gravity", "all but the head on disk", tmp_path / "offload")
    with pytest.raises(RuntimeError, match="expected masses in memory, got offloaded ones"):
        load_gravity_mass_log(loaded, tmp_path / "gravity_mass_log.pt")
