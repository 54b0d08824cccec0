"""Folders with smaller weights: how far off, what stays float32, and that they load anywhere."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import assert_within_budget
from hosts import logits
from hub.exported import (
    exact_and_peer,
    host,
    save_gravity,
    tokens,
    with_other_masses,
    with_positions,
)
from torch import Tensor

from gravity_hf import load_gravity_model
from gravity_hf.hub.card_tensors import gravity_tensors
from gravity_hf.hub.formats.export import export_gravity_model

pytest.importorskip("torchao")
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}
FORMATS = [*HALF, "int8"]

ELSEWHERE = """
import sys

sys.modules["gravity_hf"] = None
import torch
from transformers import AutoModelForCausalLM

inputs, out = torch.load(sys.argv[1]), {}
for folder in sys.argv[3:]:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    with torch.no_grad():
        out[folder] = model(**inputs).logits
torch.save(out, sys.argv[2])
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_gravity("qwen2", tmp_path_factory.mktemp("weights") / "model")


@pytest.fixture(scope="module")
def folders(folder) -> dict[str, Path]:
    for format in FORMATS:
        out = folder.parent / format
        export_gravity_model(folder, out, format=format, length=12, samples=4)
    return {format: folder.parent / format for format in FORMATS}


def inputs() -> dict[str, Tensor]:
    ids = tokens(3, 10)
    return with_positions(ids, torch.ones_like(ids))


def rounded(folder: Path, dtype: torch.dtype) -> Tensor:
    """Logits of the float32 model with its weights rounded to `dtype`, masses as they were."""
    model = load_gravity_model(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gravity." not in name:
                parameter.copy_(parameter.to(dtype).float())
    return logits(model, inputs())


@pytest.mark.parametrize("format", FORMATS)
def test_gravity_tensors_are_what_they_were_and_float32(format, folder, folders):
    before, after = gravity_tensors(folder), gravity_tensors(folders[format])
    assert before.keys() == after.keys() and len(before) == 3
    for name, tensor in before.items():
        assert after[name].dtype == torch.float32 and torch.equal(after[name], tensor), name


@pytest.mark.parametrize("format", HALF)
def test_half_precision_costs_what_rounding_weights_and_activations_costs(format, folder, folders):
    exact, _ = exact_and_peer(folder, inputs())
    model = load_gravity_model(folders[format])
    actual = logits(model, inputs())
    assert actual.dtype == HALF[format] == model.lm_head.weight.dtype
    peer = rounded(folder, HALF[format])
    # Activations are rounded, too, several times a layer.
    assert_within_budget(format, actual, exact, peer, factor=4.0)


def test_8_bit_weights_are_off_by_half_a_step_at_most(folder, folders):
    before, after = (load_gravity_model(f) for f in (folder, folders["int8"]))
    count = 0
    for name, module in before.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        other = after.get_submodule(name).weight
        if name == "lm_head":
            assert torch.equal(other, module.weight)
            continue
        step = module.weight.abs().amax(1, keepdim=True) / 127
        error = (other.dequantize() - module.weight).abs()
        assert (error <= step * 0.51).all() and error.max() > 0, name
        count += 1
    assert count == 7
    report = json.loads((folders["int8"] / "export.json").read_text())
    assert report["quantised"] == {"layers": 7, "of": 8}
    for name in ("model.embed_tokens.weight", "model.norm.weight"):
        assert torch.equal(after.state_dict()[name], before.state_dict()[name])


def test_8_bit_weights_of_a_model_without_linear_layers_are_refused(tmp_path):
    """They would be the float32 ones."""
    source = save_gravity("gpt2", tmp_path / "model")
    with pytest.raises(ValueError, match=r"GravityGPT2LMHeadModel.*Conv1D\. Use fp16"):
        export_gravity_model(source, tmp_path / "out", format="int8", length=12, samples=4)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_8_bit_weights_are_no_source_of_another_format(folders, tmp_path):
    with pytest.raises(ValueError, match="quantised already"):
        export_gravity_model(folders["int8"], tmp_path / "out", format="fp16")


def test_8_bit_weights_are_run_as_the_numbers_they_stand_for(folder, folders):
    quantised, plain = load_gravity_model(folders["int8"]), load_gravity_model(folder)
    for name, module in plain.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            module.weight.data = quantised.get_submodule(name).weight.dequantize()
    expected = logits(plain, inputs())
    exact = logits(plain.double(), inputs())
    actual = logits(quantised, inputs())
    assert_within_budget("int8", actual, exact, expected, factor=4.0)


@pytest.mark.parametrize("format", FORMATS)
def test_gravity_with_these_masses_is_in_the_folder(format, folder, folders):
    actual = logits(load_gravity_model(folders[format]), inputs()).float()
    error = (actual - exact_and_peer(folder, inputs())[0]).abs().mean()
    for other in (with_other_masses(folder, inputs()), logits(host("qwen2"), inputs())):
        assert (actual - other).abs().mean() > 2 * error


@pytest.mark.parametrize("format", FORMATS)
def test_the_folder_holds_no_pickle_and_says_what_it_is(format, folders):
    kinds = {file.suffix for file in folders[format].rglob("*") if file.is_file()}
    assert kinds == {".json", ".py", ".safetensors"}
    config = json.loads((folders[format] / "config.json").read_text())
    assert config["model_type"] == "gravity_qwen2" and config["gravity"]["law"] == "force"
    # As the model's owner set it, whatever ran the export.
    assert config["gravity"]["implementation"] == "chunked"


@pytest.mark.parametrize("format", FORMATS)
def test_what_was_measured_is_what_the_folder_gives(format, folder, folders):
    report = json.loads((folders[format] / "export.json").read_text())
    measured = report["measured"]
    assert 0 < measured["kl_mean"] <= measured["kl_max"] < 0.1
    assert report["bytes_after"] < report["bytes_before"]
    ids = torch.randint(97, (64, 12))
    batch = with_positions(ids, torch.ones_like(ids))
    actual = logits(load_gravity_model(folders[format]), batch).double()
    exact = exact_and_peer(folder, batch)[0]
    found = ((actual - exact).abs().max() / exact.abs().max()).item()
    # The largest over other and more tokens; a factor in either direction.
    assert measured["relative_error"] / 4 < found < measured["relative_error"] * 4


def test_they_load_where_the_library_is_not_installed(folders, tmp_path):
    torch.save(inputs(), tmp_path / "inputs.pt")
    names = [str(folders[format]) for format in FORMATS]
    arguments = [str(tmp_path / "inputs.pt"), str(tmp_path / "out.pt"), *names]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for name, found in torch.load(tmp_path / "out.pt").items():
        expected = logits(load_gravity_model(name), inputs())
        assert found.dtype == expected.dtype
        unit = torch.finfo(found.dtype).eps * expected.abs().max()
        assert (found - expected).abs().max() <= 16 * unit, name
