"""convert, status and generate, one after the other, as a user calls them."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
from cli.commands import run
from cli.conversions import TEXT
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from gravity_hf import GravityConfig, gravity_lora, load_gravity_model, patch_with_gravity
from gravity_hf.training.tokenizers import byte_tokenizer

SMALL = ("--samples", 2, "--length", 32, "--no-figures")


def test_convert_then_status_then_generate(decoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    converted = run("convert", decoder, out, *SMALL, "--softness", 2)
    assert converted.exit_code == 0, converted.output
    assert "loss on held-out text" in converted.output
    names = {file.name for file in out.iterdir()}
    expected = {"config.json", "model.safetensors", "tokenizer.json", "calibration.json"}
    assert expected | {"calibration.txt", "results.json", "README.md"} <= names

    shown = run("status", out)
    assert shown.exit_code == 0, shown.output
    for text in ("gravity model", "softness 2", "lifted", "layers.1.self_attn", "contrast"):
        assert text in shown.output

    written = run("generate", out, "def ", "--max-new-tokens", 4, "--seed", 3)
    assert written.exit_code == 0, written.output
    assert written.stdout.startswith("def ")
    again = run("generate", out, "def ", "--max-new-tokens", 4, "--seed", 3)
    assert again.stdout == written.stdout


def test_converted_folder_loads_with_the_settings_asked_for(decoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--law", "power", "--distance", "euclidean", "--softness", 0, "--layers", 1)
    assert run("convert", decoder, out, *SMALL, *options, "--mass-per", "kv_head").exit_code == 0
    settings = load_gravity_model(out).config.gravity
    wanted = {"law": "power", "distance": "euclidean", "softness": 0.0, "layers": [1]}
    assert wanted.items() <= settings.items()
    assert settings["mass_per"] == "kv_head"


def test_an_encoder_is_measured_by_its_embeddings(encoder: Path, tmp_path: Path) -> None:
    result = run("convert", encoder, tmp_path / "out", *SMALL)
    assert result.exit_code == 0, result.output
    assert "mean cosine" in result.output
    refused = run("generate", tmp_path / "out", "text")
    assert refused.exit_code == 2
    assert "encoder" in refused.output


@pytest.mark.slow
def test_force_starts_anew_and_replaces_a_model_and_nothing_else(
    decoder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert run("convert", decoder, out, *SMALL).exit_code == 0
    (out / "note.txt").write_text("old")
    again = run("convert", decoder, out, *SMALL)
    assert again.exit_code == 0 and "save: finished before" in again.output
    assert (out / "note.txt").exists()
    forced = run("convert", decoder, out, *SMALL, "--force")
    assert forced.exit_code == 0 and "finished before" not in forced.output
    assert not (out / "note.txt").exists()

    other = Path(shutil.copytree(decoder, tmp_path / "other"))
    refused = run("convert", other, out, *SMALL)
    assert refused.exit_code == 2
    assert "--force" in refused.output

    plain = Path(shutil.copytree(decoder, tmp_path / "plain"))
    assert "--force" in run("convert", decoder, plain, *SMALL).output
    assert run("convert", decoder, plain, *SMALL, "--force").exit_code == 0
    assert load_gravity_model(plain).config.gravity["softness"] == 1

    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "letter.txt").write_text("dear")
    assert run("convert", decoder, mine, *SMALL, "--force").exit_code == 2
    assert (mine / "letter.txt").read_text() == "dear"


def test_a_failed_conversion_leaves_nothing_behind(decoder: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.iterdir())
    assert run("convert", decoder, tmp_path / "out", *SMALL, "--law", "gravity").exit_code == 2
    short = tmp_path / "short.txt"
    short.write_text("too short")
    assert run("convert", decoder, tmp_path / "out", *SMALL, "--text", short).exit_code == 2
    assert sorted(tmp_path.iterdir()) == sorted([*before, short])


def test_status_tells_a_plain_model_and_an_adapter_apart(decoder: Path, tmp_path: Path) -> None:
    plain = run("status", decoder)
    assert plain.exit_code == 0
    assert "not a gravity model" in plain.output
    assert "gravity-hf convert" in plain.output

    model = AutoModelForCausalLM.from_pretrained(decoder)
    config = LoraConfig(r=2, target_modules=["q_proj"])
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    adapter = run("status", tmp_path / "adapter")
    assert adapter.exit_code == 0
    assert "LORA adapter" in adapter.output


def test_status_reads_only_gravity_tensors(decoder: Path, tmp_path: Path) -> None:
    """Weights may be absent or huge: only the shard with the masses is needed."""
    out = tmp_path / "out"
    assert run("convert", decoder, out, *SMALL).exit_code == 0
    from safetensors.torch import load_file, save_file

    tensors = load_file(out / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if ".gravity." in name}
    (out / "model.safetensors").unlink()
    save_file(kept, out / "model-00001-of-00002.safetensors")
    assert run("status", out).exit_code == 0


@pytest.mark.parametrize("converted", [False, True], ids=["host", "gravity"])
def test_byte_tokenizer_round_trips(converted: bool, decoder: Path, tmp_path: Path) -> None:
    """AutoTokenizer once took Qwen2's class for the host and read every text as nothing."""
    folder = tmp_path / "out" if converted else decoder
    if converted:
        assert run("convert", decoder, folder, *SMALL).exit_code == 0
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "def é(x):\n\treturn  '漢' # a ,b \r\n"
    ids = tokenizer(text)["input_ids"]
    assert ids == list(text.encode())
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 256


def test_a_foreign_tokenizer_is_refused(decoder: Path, tmp_path: Path) -> None:
    """Ids beyond the vocabulary would be an index error deep inside the model."""
    letters = byte_tokenizer()
    letters.add_tokens(["return"])
    letters.save_pretrained(decoder)
    text = tmp_path / "code.txt"
    text.write_text("return 1\n" * 2000)
    result = run("convert", decoder, tmp_path / "out", *SMALL, "--text", text)
    assert result.exit_code == 2
    assert "vocabulary" in result.stderr


def test_an_adapter_writes_with_its_base(decoder: Path, tmp_path: Path) -> None:
    model = patch_with_gravity(AutoModelForCausalLM.from_pretrained(decoder), GravityConfig())
    gravity_lora(model, r=2).save_pretrained(tmp_path / "adapter")
    shown = run("status", tmp_path / "adapter")
    assert "with masses" in shown.output
    written = run("generate", tmp_path / "adapter", "x = ", "--max-new-tokens", 3)
    assert written.exit_code == 0, written.output
    assert written.stdout.startswith("x = ")


def test_convert_trains_when_it_is_asked_to(decoder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--transfer-steps", 2, "--lora-steps", 2, "--lora-rank", 2, "--no-control")
    options += ("--max-kl", 0.5, "--batch-size", 2, "--text", TEXT)
    result = run("convert", decoder, out, *SMALL, *options)
    assert result.exit_code == 0, result.output
    assert "Attention transfer: 2 steps" in result.output
    assert "gravity, after LoRA" in result.output
    results = json.loads((out / "results.json").read_text())
    assert results["training"]["control"] is None
    assert results["calibration"]["max_kl"] == 0.5
    command = results["conditions"]["command"]
    assert "--max-kl 0.5" in command and "--no-control" in command


def test_the_command_in_the_results_repeats_the_conversion(
    decoder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It names no folders that lead there: it is run where the model lies.
    monkeypatch.chdir(tmp_path)
    options = ("--softness", 0.5, "--law", "power", "--layers", "1", "--skip", "card")
    assert run("convert", "decoder", "out", *SMALL, *options).exit_code == 0
    command = json.loads(Path("out/results.json").read_text())["conditions"]["command"]
    again = run(*shlex.split(command)[1:])
    assert again.exit_code == 0, again.output
    assert again.output.count("finished before") == 5
