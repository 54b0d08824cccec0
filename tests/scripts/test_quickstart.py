"""The quickstart: one command from nothing to a model that is ready to chat."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

FILE = Path(__file__).resolve().parents[2] / "scripts" / "quickstart.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("quickstart", FILE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_trains_saves_shows_a_sample_and_says_what_next(script, tmp_path, capsys, monkeypatch):
    text, out = tmp_path / "text.txt", tmp_path / "model"
    text.write_text("The apple falls to the Earth. " * 40)
    opened = []
    monkeypatch.setattr(script, "app", opened.append)
    script.main(["--quick", "--text", str(text), "--out", str(out), "--chat"])
    shown = capsys.readouterr().out
    assert f"gravity-hf chat {out}" in shown and "nats per character" in shown
    assert "'loss'" not in shown
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.model_type == "ngt" and len(tokenizer) == model.config.vocab_size
    sample = shown.split("\n\n")[1]
    assert sample.startswith(script.PROMPT) and len(sample) > len(script.PROMPT)
    assert opened == [["chat", str(out)]]


def test_a_folder_with_something_in_it_is_not_touched(script, tmp_path, capsys):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit) as end:
        script.main(["--quick", "--out", str(tmp_path)])
    assert end.value.code == 2 and "is not empty" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]
