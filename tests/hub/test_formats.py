"""What every export promises: refusals before any change, whole folders, honest numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from cli.commands import run
from cli.conversions import TEXT, save_decoder
from hosts import logits, tiny_inputs
from hub.exported import content, host, save_gravity, tokens
from transformers import AutoModelForCausalLM, AutoTokenizer

from gravity_hf import calibrate, load_gravity_model, patch_with_gravity
from gravity_hf.hub.formats.export import export_gravity_model
from gravity_hf.hub.formats.measuring import measure, require_same_model
from gravity_hf.hub.formats.running import runner_of_model
from gravity_hf.hub.formats.samples import make_samples
from gravity_hf.hub.formats.source import load_runnable, load_source

SMALL = {"length": 12, "samples": 4}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_gravity("qwen2", tmp_path_factory.mktemp("formats") / "model")


def test_gguf_on_the_command_line_is_one_plain_error(folder, tmp_path):
    result = run("export", folder, tmp_path / "out", "--format", "GGUF")
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert result.output.count("error:") == 1 and "dot-product attention" in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["cross attention", "vit"])
def test_other_kinds_of_models_come_in_smaller_weights(name, tmp_path):
    source = save_gravity(name, tmp_path / "model")
    report = export_gravity_model(source, tmp_path / "out", format="bf16", **SMALL)
    assert report.bytes_after < 0.6 * report.bytes_before
    inputs = tiny_inputs(name)
    before, after = (logits(load_gravity_model(f), inputs) for f in (source, tmp_path / "out"))
    error = (after.float() - before).abs().max() / before.abs().max()
    assert 0 < error < 4 * report.measured["relative_error"]


def test_a_folder_that_holds_something_is_replaced_by_force_only(folder, tmp_path):
    out = tmp_path / "out"
    export_gravity_model(folder, out, format="fp16", **SMALL)
    before = content(out)
    with pytest.raises(ValueError, match="not empty"):
        export_gravity_model(folder, out, format="bf16", **SMALL)
    assert content(out) == before
    export_gravity_model(folder, out, format="bf16", force=True, **SMALL)
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    other = tmp_path / "notes"
    other.mkdir()
    (other / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="replaces model folders only"):
        export_gravity_model(folder, other, format="fp16", force=True, **SMALL)
    assert content(other) == {"notes.txt": b"mine"}


def test_numbers_that_a_format_cannot_hold_leave_the_old_folder_as_it_was(folder, tmp_path):
    """A weight beyond the range of float16 gives infinities, not a folder."""
    model = load_gravity_model(folder)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e7)
    model.save_pretrained(tmp_path / "large")
    out = tmp_path / "out"
    export_gravity_model(folder, out, format="fp16", **SMALL)
    before = content(out)
    with pytest.raises(ValueError, match=r"NaN or infinity.*bf16"):
        export_gravity_model(tmp_path / "large", out, format="fp16", force=True, **SMALL)
    assert content(out) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["large", "out"]


def test_a_program_with_other_masses_would_be_noticed(folder, tmp_path):
    source = load_source(folder)
    samples = make_samples(source, None, 4, 12, 0)
    same = measure(source, runner_of_model(load_runnable(folder), "decoder"), samples)
    require_same_model(source, same)
    assert same["greedy"]["equal"] == same["greedy"]["tokens"] and same["kl_max"] < 1e-9
    other = load_runnable(folder)
    with torch.no_grad():
        other.model.layers[0].self_attn.gravity.mass_log += 0.5
    with pytest.raises(ValueError, match="Nothing was written"):
        require_same_model(source, measure(source, runner_of_model(other, "decoder"), samples))


def test_a_model_in_memory_is_exported_as_it_is_and_not_changed(tmp_path):
    model = patch_with_gravity(host("qwen2"))
    calibrate(model, [{"input_ids": tokens(2, 12)}], progress=False)
    model.to(torch.bfloat16).train()
    before = {name: x.clone() for name, x in model.state_dict().items()}
    report = export_gravity_model(model, tmp_path / "out", format="bf16", **SMALL)
    assert model.training and model.dtype == torch.bfloat16
    assert all(torch.equal(before[name], x) for name, x in model.state_dict().items())
    loaded = load_gravity_model(tmp_path / "out").state_dict()
    assert all(torch.equal(before[name], x) for name, x in loaded.items())
    assert report.measured_on == "4 windows of at most 12 tokens of random tokens, seed 0"


def test_the_command_line_measures_on_text_and_says_how_to_repeat_it(tmp_path):
    plain, source, out = (tmp_path / name for name in ("plain", "model", "out"))
    model = patch_with_gravity(AutoModelForCausalLM.from_pretrained(save_decoder(plain)))
    calibrate(model, [{"input_ids": tokens(2, 12)}], progress=False)
    model.save_pretrained(source)
    AutoTokenizer.from_pretrained(plain).save_pretrained(source)
    flags = ["--text", TEXT, "--samples", 2, "--length", 16, "--seed", 3]
    result = run("export", source, out, "--format", "FP16", *flags)
    assert result.exit_code == 0, result.output
    assert "mean KL, nats" in result.output and "of 32 tokens" in result.output
    assert f"2 windows of at most 16 tokens of {TEXT.name}, seed 3" in result.output
    report = json.loads((out / "export.json").read_text())
    # By names alone: the file is read on other machines.
    command = f"gravity-hf export model out --format fp16 --text {TEXT.name} --samples 2"
    assert report["command"] == f"{command} --length 16 --seed 3"
    assert str(tmp_path) not in (out / "export.json").read_text()
    assert report["gravity"]["law"] == "force" and report["model_type"] == "gravity_qwen2"
    assert len(AutoTokenizer.from_pretrained(out)) == len(AutoTokenizer.from_pretrained(source))
