"""scripts/train_geolip.py as it is typed: what it trains, leaves behind, and says."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

import gravity_hf  # noqa: F401  makes AutoModel know a geolip
from gravity_hf.models.geolip import GeolipCompanion

FILE = Path(__file__).resolve().parents[2] / "scripts" / "train_geolip.py"
SIZES = ["--set", "num_rows=4", "lens_dim=4", "hidden_size=8", "--steps", "2", "--device", "cpu"]
WORDS = ["gravity", "holds", "what", "is", "near", "and", "lets", "go", "of", "all", "far", "away"]


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_geolip", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def failure(script, capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        script.main([str(argument) for argument in arguments])
    return end.value.code, capsys.readouterr().err


def test_without_arguments_it_is_a_tiny_geolip_of_synthetic_images(script, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    seen = []

    def stop(settings):
        seen.append(settings)
        raise KeyboardInterrupt

    monkeypatch.setattr("gravity_hf.training.geolip.runs.train_images", stop)
    with pytest.raises(SystemExit) as end:
        script.main([])
    assert end.value.code == 130
    (settings,) = seen
    assert (settings.images, settings.preset, settings.steps) == ("shapes", "tiny", 400)
    assert settings.out == "geolip-images"


def test_images_are_trained_measured_drawn_and_described(script, tmp_path, capsys):
    out = tmp_path / "out"
    script.main(
        ["images", "--images", "waves", "--count", "12", "--image-size", "8", "--out", str(out)]
        + [*SIZES, "--spectral-attention", "gravity", "--seed", "3"]
    )
    shown = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert f"{results['verdict']['recon_cosine']:.4f}" in shown and "Mechanism B" in shown
    assert f"gravity-hf status {out}" in shown
    model = AutoModel.from_pretrained(out)
    assert model.config.spectral_attention == "gravity" and model.config.num_rows == 4
    assert results["training"]["seed"] == 3
    card = (out / "README.md").read_text()
    for figure in json.loads((out / "figures" / "figures.json").read_text()):
        assert (out / "figures" / figure["file"]).is_file()
    assert "figures/reconstructions.png" in card and f"{out}" not in card
    code, error = failure(script, capsys, "images", "--out", out, *SIZES)
    assert code == 2 and "--force" in error


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """A folder with a host that nobody trained, and its tokenizer."""
    folder = tmp_path_factory.mktemp("host")
    ids = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *dict.fromkeys(WORDS)])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    BertModel(
        BertConfig(
            vocab_size=len(ids),
            hidden_size=8,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=8,
        )
    ).save_pretrained(folder)
    return folder


def test_features_become_a_companion_beside_their_host(script, host, tmp_path, capsys):
    text, out = tmp_path / "text.txt", tmp_path / "out"
    text.write_text("\n\n".join(" ".join(WORDS[i:] + WORDS[:i]) for i in range(12)))
    script.main(
        ["features", "--host", str(host), "--text", str(text), "--layer", "0", "--max-length", "8"]
        + ["--companion", "--no-figures", "--out", str(out), *SIZES]
    )
    assert "cosine" in capsys.readouterr().out and not (out / "figures").exists()
    companion = AutoModel.from_pretrained(out)
    assert isinstance(companion, GeolipCompanion) and companion.config.read_layer == 0
    inputs = AutoTokenizer.from_pretrained(out)("gravity holds", return_tensors="pt")
    with torch.no_grad():
        assert companion(**inputs).omega.shape == (1, 2, 4)
    results = json.loads((out / "results.json").read_text())
    assert results["model_type"] == "geolip_companion"
    assert str(tmp_path) not in json.dumps(results) and str(host.parent) not in json.dumps(results)
    assert companion.config.geolip.verdict == results["verdict"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["images", "--set", "num_rows"], "NAME=VALUE"),
        (["images", "--set", "rows=4"], "rows"),
        (["--images", "nothing/here", "--out", "new"], "shapes"),
        (["features", "--host", "nothing/here", "--text", "none.txt", "--out", "new"], "none.txt"),
    ],
)
def test_errors_are_one_line(script, capsys, monkeypatch, tmp_path, arguments, says):
    monkeypatch.chdir(tmp_path)
    code, error = failure(script, capsys, *arguments)
    assert code == 2 and says in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_options_that_are_given_again_are_added(script):
    twice = ["features", "--text", "a", "--text", "b", "--set", "c=1", "--set", "d=2"]
    options = script.parser().parse_args(twice)
    assert options.text_files == ["a", "b"] and options.overrides == ["c=1", "d=2"]


def test_values_are_json_or_words(script):
    found = script.overrides_of(["lens_mode=learned", "num_rows=8", "is_causal=true", "a=b=c"])
    assert found == {"lens_mode": "learned", "num_rows": 8, "is_causal": True, "a": "b=c"}


def test_one_process_of_several_writes(script, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr("gravity_hf.training.geolip.runs.train_images", lambda settings: settings)
    script.main(["images", "--out", str(tmp_path / "out")])
    assert capsys.readouterr().out == "" and os.listdir(tmp_path) == []
