"""Gravity-2's checkpoints: a plain host and its masses in a file of their own."""

from __future__ import annotations

import pytest
import torch
from hosts import logits, tiny_host, tiny_inputs

from gravity_hf import (
    GravityConfig,
    calibrate,
    gravity_status,
    load_gravity_mass_log,
    load_gravity_model,
    patch_with_gravity,
)
from gravity_hf.integration.hosts import gravity_modules


def masses(count, seed=5):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(count, generator=generator) for _ in range(3)]


def expected_logits(rows, **settings):
    model = patch_with_gravity(tiny_host("qwen2"), GravityConfig(**settings))
    with torch.no_grad():
        for module, row in zip(gravity_modules(model).values(), rows, strict=True):
            module.mass_log.copy_(row)
    return logits(model, tiny_inputs("qwen2"))


@pytest.mark.parametrize("granularity, count", [("query_head", 6), ("kv_head", 2), ("layer", 1)])
def test_a_mass_file_patches_a_plain_host_with_gravity_2_s_constants(granularity, count, tmp_path):
    rows = masses(count)
    names = [f"model.layers.{i}.self_attn.gravity_mass_log" for i in range(3)]
    torch.save(dict(zip(names, rows, strict=True)), tmp_path / "gravity_mass_log.pt")
    model = load_gravity_mass_log(tiny_host("qwen2"), tmp_path / "gravity_mass_log.pt")
    config = gravity_status(model).config
    assert config == GravityConfig(mass_per=granularity) and config.epsilon == 0.1
    expected = expected_logits(rows, mass_per=granularity)
    assert torch.equal(logits(model, tiny_inputs("qwen2")), expected)


@pytest.mark.parametrize("name", ["gravity_mass_log.pt", "gravity_mass_log.safetensors"])
def test_a_plain_folder_with_a_mass_file_beside_it_is_a_gravity_2_model(name, tmp_path):
    tiny_host("qwen2").save_pretrained(tmp_path)
    rows = masses(6)
    if name.endswith(".pt"):
        torch.save(torch.stack(rows), tmp_path / name)
    else:
        import safetensors.torch

        keyed = {f"model.layers.{i}.self_attn.gravity_mass_log": r for i, r in enumerate(rows)}
        safetensors.torch.save_file(keyed, tmp_path / name)
    model = load_gravity_model(tmp_path)
    assert torch.equal(logits(model, tiny_inputs("qwen2")), expected_logits(rows))
    model.save_pretrained(tmp_path / "ours")
    again = load_gravity_model(tmp_path / "ours")
    assert torch.equal(logits(again, tiny_inputs("qwen2")), expected_logits(rows))


def test_a_plain_folder_without_masses_is_refused(tmp_path):
    tiny_host("qwen2").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"got a plain qwen2.*patch_with_gravity"):
        load_gravity_model(tmp_path)


@pytest.mark.parametrize(
    "content, message",
    [
        (torch.zeros(2, 6), "layers"),
        (torch.zeros(3, 5), "expected 6"),
        (torch.full((3, 6), float("nan")), "finite"),
        (torch.zeros(3, 6, dtype=torch.long), "float"),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(content, message, tmp_path):
    torch.save(content, tmp_path / "gravity_mass_log.pt")
    model, inputs = tiny_host("qwen2"), tiny_inputs("qwen2")
    before, cls = logits(model, inputs), type(model)
    with pytest.raises(ValueError, match=message):
        load_gravity_mass_log(model, tmp_path / "gravity_mass_log.pt")
    assert type(model) is cls and torch.equal(logits(model, inputs), before)


def test_masses_of_another_granularity_are_refused_on_a_patched_model(tmp_path):
    torch.save(torch.zeros(3, 2), tmp_path / "gravity_mass_log.pt")
    model = patch_with_gravity(tiny_host("qwen2"))
    with pytest.raises(ValueError, match=r"expected 6 masses.*one per query_head.*got 2"):
        load_gravity_mass_log(model, tmp_path / "gravity_mass_log.pt")


def test_masses_of_gravity_2_are_refused_on_a_calibrated_model(tmp_path):
    torch.save(torch.zeros(3, 6), tmp_path / "gravity_mass_log.pt")
    model = patch_with_gravity(tiny_host("qwen2"))
    calibrate(model, [tiny_inputs("qwen2")])
    with pytest.raises(ValueError, match="got a model with 'force' and 'lifted'"):
        load_gravity_mass_log(model, tmp_path / "gravity_mass_log.pt")


def test_a_malicious_mass_file_beside_a_host_runs_nothing(tmp_path):
    import os
    import pickle

    tiny_host("qwen2").save_pretrained(tmp_path)
    marker = tmp_path / "marker"

    class Attack:
        def __reduce__(self):
            return (os.system, (f"touch {marker}",))

    (tmp_path / "gravity_mass_log.pt").write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ValueError, match="code"):
        load_gravity_model(tmp_path)
    assert not marker.exists()
