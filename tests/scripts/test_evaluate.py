"""`gravity-hf evaluate` and scripts/evaluate.py, end to end on byte-level models."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli.commands import TINY, run
from transformers import AutoModelForCausalLM, BertConfig, BertForMaskedLM, Qwen2ForCausalLM

from gravity_hf import calibrate, gravity_lora, patch_with_gravity
from gravity_hf.cli.demo.host import new_host
from gravity_hf.training.files import write_json
from gravity_hf.training.tokenizers import byte_tokenizer

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "evaluate.py"
SMALL = ("--length", 32, "--max-tokens", 200)


@pytest.fixture
def host(tmp_path: Path) -> Path:
    folder = tmp_path / "host"
    new_host(TINY).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def gravity(host: Path, tmp_path: Path) -> Path:
    folder = tmp_path / "gravity"
    model = patch_with_gravity(Qwen2ForCausalLM.from_pretrained(host))
    calibrate(model, [{"input_ids": torch.arange(64)[None]}], softness=3.0, progress=False)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def test_a_gravity_model_is_measured_against_its_host(
    host: Path, gravity: Path, tmp_path: Path
) -> None:
    out = tmp_path / "results" / "evaluation.json"
    text = tmp_path / "text.txt"
    text.write_text("what goes up must come down\n" * 20)
    options = ("--text", text, "--stride", 8, "--prompt", "up ", "--max-new-tokens", 4)
    result = run("evaluate", gravity, "--against", host, *SMALL, *options, "--out", out)
    assert result.exit_code == 0, result.output
    for part in ("difference", "contrast, median", "lifted", "> up ", str(text)):
        assert part in result.stdout
    content = json.loads(out.read_text())
    assert content["loss"]["tokens"] == 199
    assert content["attention"]["settings"]["softness"] == 3.0
    assert content["against"]["attention"] is None
    gap = content["loss"]["nats_per_token"] - content["against"]["loss"]["nats_per_token"]
    assert content["difference"]["nats_per_token"] == gap != 0
    assert content["samples"][0]["prompt"] == "up "
    assert content["conditions"]["stride"] == 8
    assert [file.name for file in out.parent.iterdir()] == ["evaluation.json"]
    again = tmp_path / "again.json"
    run("evaluate", gravity, "--against", host, *SMALL, *options, "--out", again)
    same = json.loads(again.read_text())
    assert (same["loss"], same["samples"]) == (content["loss"], content["samples"])


def test_an_adapter_is_measured_with_its_base(host: Path, tmp_path: Path) -> None:
    model = patch_with_gravity(AutoModelForCausalLM.from_pretrained(host))
    gravity_lora(model, r=2).save_pretrained(tmp_path / "adapter")
    result = run("evaluate", tmp_path / "adapter", *SMALL, "--no-attention")
    assert result.exit_code == 0, result.output
    assert "loss, nats per token" in result.stdout
    assert "contrast" not in result.stdout


def test_an_encoder_is_compared_with_its_host(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4}
    config = BertConfig(vocab_size=256, num_hidden_layers=2, initializer_range=0.2, **sizes)
    model = BertForMaskedLM(config)
    for name in ("host", "gravity"):
        if name == "gravity":
            patch_with_gravity(model)
        model.save_pretrained(tmp_path / name)
        byte_tokenizer().save_pretrained(tmp_path / name)
    alone = run("evaluate", tmp_path / "gravity", *SMALL)
    assert alone.exit_code == 2
    assert "against: expected the host" in alone.stderr
    result = run("evaluate", tmp_path / "gravity", "--against", tmp_path / "host", *SMALL)
    assert result.exit_code == 0, result.output
    for part in ("mean cosine", "same neighbour", "contrast"):
        assert part in result.stdout
    itself = run("evaluate", tmp_path / "host", "--against", tmp_path / "host", *SMALL)
    (line,) = [x for x in itself.stdout.splitlines() if "mean cosine" in x]
    assert line.split()[-1] == "1.0000"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("./nowhere",), "there is none at './nowhere'"),
        (("nowhere",), "the name of a model on the Hub"),
        (("HOST", "--length", 8, "--stride", 9), "stride: expected 1 to length (8)"),
        (("HOST", "--dtype", "int8"), "dtype: expected one of"),
        (("HOST", "--text", "nowhere.txt"), "nowhere.txt"),
    ],
)
def test_errors_are_one_line_and_write_nothing(
    arguments: tuple, message: str, host: Path, tmp_path: Path
) -> None:
    named = [host if argument == "HOST" else argument for argument in arguments]
    result = run("evaluate", *named, "--out", tmp_path / "evaluation.json")
    assert result.exit_code == 2
    assert message in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "evaluation.json").exists()


def test_a_result_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    file = tmp_path / "evaluation.json"
    write_json(file, {"loss": 1})
    with pytest.raises(TypeError):
        write_json(file, {"loss": object()})
    assert json.loads(file.read_text()) == {"loss": 1}
    assert list(tmp_path.iterdir()) == [file]


def call_script(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, SCRIPT, *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env=environment
    )


def test_the_script_takes_yaml_and_agrees_with_the_command(gravity: Path, tmp_path: Path) -> None:
    out = tmp_path / "script.json"
    settings = tmp_path / "evaluation.yaml"
    settings.write_text(f"model: {gravity}\nlength: 32\nmax_tokens: 200\ndevice: cpu\nout: {out}\n")
    done = call_script(settings)
    assert done.returncode == 0, done.stderr
    assert "contrast, median" in done.stdout
    assert "%|" not in done.stderr
    run("evaluate", gravity, *SMALL, "--out", tmp_path / "command.json")
    loss = json.loads((tmp_path / "command.json").read_text())["loss"]
    assert json.loads(out.read_text())["loss"] == pytest.approx(loss, rel=1e-6)


def test_the_script_refuses_names_that_it_does_not_know(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("evaluate_script", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    settings = tmp_path / "evaluation.yaml"
    settings.write_text("model: somewhere\nlenght: 32\n")
    with pytest.raises(ValueError, match="lenght"):
        script.parse([str(settings)])
    flags = ["--model", "somewhere", "--length", "32", "--prompts", "a", "b", "--no_attention"]
    parsed = script.parse(flags)
    assert (parsed.length, parsed.prompts, parsed.attention) == (32, ["a", "b"], False)
