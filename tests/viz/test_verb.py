"""`gravity-hf figures`, as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from cli.commands import run
from cli.conversions import save_decoder
from transformers import AutoModelForCausalLM, AutoTokenizer

from gravity_hf import calibrate, gravity_lora, patch_with_gravity


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A host, the gravity model made from it, an adapter on the host, and a text."""
    root = tmp_path_factory.mktemp("models")
    host = save_decoder(root / "host")
    (root / "text.txt").write_text("def fall(): return 1\n" * 40)
    tokenizer = AutoTokenizer.from_pretrained(host)
    model = patch_with_gravity(AutoModelForCausalLM.from_pretrained(host))
    report = calibrate(model, [dict(tokenizer("def fall(): pass", return_tensors="pt"))])
    model.save_pretrained(root / "model")
    tokenizer.save_pretrained(root / "model")
    (root / "model" / "calibration.json").write_text(report.to_json())
    log = [{"step": 1, "loss": 2.0, "grad_norm": 0.5}, {"step": 2, "loss": 1.5, "grad_norm": 0.4}]
    (root / "model" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    gravity_lora(model, r=2).save_pretrained(root / "adapter")
    return root


def test_a_folder_becomes_figures(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--text", folders / "text.txt", "--layer", 1, "--head", 2, "--interactive")
    result = run("figures", folders / "model", "-o", out, "--against", folders / "host", *options)
    assert result.exit_code == 0, result.output
    entries = {entry["name"]: entry for entry in json.loads((out / "figures.json").read_text())}
    wanted = {"masses", "contrast", "score-curves", "attention", "queries-and-keys", "losses"}
    assert wanted <= entries.keys()
    assert entries["attention"]["title"] == "Attention of host and gravity: layer 1, head 2"
    for entry in entries.values():
        assert (out / entry["file"]).is_file()
        assert entry["file"] in result.output and entry["title"] in result.output
    assert "interactive.html" in result.output


def test_an_adapter_becomes_figures(folders: Path) -> None:
    result = run("figures", folders / "adapter", "--text", folders / "text.txt", "--theme", "dark")
    assert result.exit_code == 0, result.output
    titles = [
        e["title"] for e in json.loads((folders / "adapter/figures/figures.json").read_text())
    ]
    assert any(title.startswith("Attention of dot product and gravity") for title in titles)


def test_what_is_no_gravity_model_is_refused_in_one_line(folders: Path, tmp_path: Path) -> None:
    for where, words in (("host", "gravity model"), ("nowhere", "gravity-hf convert")):
        result = run("figures", folders / where, "-o", tmp_path / "out")
        assert result.exit_code == 2
        assert words in result.output and "Traceback" not in result.output
    assert not (tmp_path / "out").exists()
