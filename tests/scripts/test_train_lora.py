"""scripts/train_lora.py: LoRA on a gravity model or a host, resumed, in 4 bits."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cli.conversions import TEXT, convert, ran, save_decoder, save_encoder, tensors

from gravity_hf import gravity_status, load_gravity_model
from gravity_hf.integration.hosts import gravity_modules

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "train_lora.py"
SMALL = {
    "text_files": TEXT,
    "length": 32,
    "samples": 4,
    "steps": 4,
    "rank": 2,
    "learning_rate": 1e-2,
    "batch_size": 2,
    "save_steps": 2,
    "logging_steps": 1,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_decoder(tmp_path_factory.mktemp("host") / "decoder")


@pytest.fixture(scope="module")
def gravity(host: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model, not trained."""
    out = tmp_path_factory.mktemp("gravity") / "out"
    convert(host, out, transfer_steps=0, lora_steps=0, softness=0.5, skip=["evaluate", "card"])
    return out


class Script:
    """Runs the script in this process, on one thread."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, model: Path, out: Path, **changes: Any) -> str:
        values = {"model": model, "out": out, **SMALL, **changes}
        arguments = [f"--{name}={value}" for name, value in values.items() if value is not None]
        self.monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        finally:
            torch.set_num_threads(before)
        return self.capsys.readouterr().out

    def refused(self, model: Path, out: Path, **changes: Any) -> str:
        with pytest.raises(SystemExit) as stopped:
            self(model, out, **changes)
        assert stopped.value.code == 2
        return self.capsys.readouterr().err.strip().splitlines()[-1]


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Script:
    return Script(monkeypatch, capsys)


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def test_a_gravity_model_gets_an_adapter_that_loads(
    script: Script, gravity: Path, tmp_path: Path
) -> None:
    out = tmp_path / "adapter"
    screen = script(gravity, out)
    assert "LoRA under gravity: 4 steps" in screen
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json"} <= {
        file.name for file in out.iterdir()
    }
    model = load_gravity_model(out)
    assert gravity_status(model).config.softness == 0.5
    base = load_gravity_model(gravity)
    for name, module in gravity_modules(model.get_base_model()).items():
        assert not torch.equal(module.mass_log, base.get_submodule(name).gravity.mass_log)
    measured = results(out)["evaluation"]
    assert measured["loss_before"] != measured["loss_after"]
    about = results(out)["model"]
    assert about["local"] and about["dtype"] == "float32"
    assert str(gravity.parent) not in (out / "results.json").read_text()


def test_a_host_is_converted_on_the_fly(script: Script, host: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    script(host, out, softness=0.25, law="power")
    settings = gravity_status(load_gravity_model(out)).config
    assert (settings.softness, settings.law, settings.distance) == (0.25, "power", "lifted")
    assert results(out)["model"]["calibration"]["softness"] == 0.25
    assert (out / "calibration.json").exists()


@pytest.mark.slow
def test_called_again_it_does_nothing_and_more_steps_train_anew(
    script: Script, host: Path, tmp_path: Path
) -> None:
    out, whole = tmp_path / "adapter", tmp_path / "whole"
    script(host, out)
    assert script(host, out).count("finished before") == 3
    screen = script(host, out, steps=6)
    assert "load: finished before" in screen and "lora, again: steps was 4, is 6" in screen
    assert "lora" not in ran(script(host, out, steps=6))
    script(host, whole, steps=6)
    found, expected = tensors(out), tensors(whole)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_softness_is_for_hosts_only(script: Script, gravity: Path, tmp_path: Path) -> None:
    message = script.refused(gravity, tmp_path / "adapter", softness=1.0)
    assert message.startswith("error: softness: expected none for a gravity model")
    assert not (tmp_path / "adapter").exists()


def test_an_encoder_is_sent_to_convert(script: Script, tmp_path: Path) -> None:
    encoder = save_encoder(tmp_path / "encoder")
    assert "gravity-hf convert" in script.refused(encoder, tmp_path / "adapter")


@pytest.mark.parametrize("wrong", [{"steps": 0}, {"learning_rate": 0}, {"softness": -1}])
def test_wrong_settings_are_refused_before_anything_is_kept(
    wrong: dict[str, Any], script: Script, host: Path, tmp_path: Path
) -> None:
    assert "expected" in script.refused(host, tmp_path / "adapter", **wrong)
    assert not (tmp_path / "adapter").exists()


def test_four_bits_ask_for_bitsandbytes(
    script: Script, host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = importlib.util.find_spec
    hide = lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", hide)
    message = script.refused(host, tmp_path / "adapter", qlora=True)
    assert message.endswith("pip install bitsandbytes")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
def test_under_four_bits_masses_stay_float32_and_the_adapter_loads(
    script: Script, host: Path, tmp_path: Path
) -> None:
    out = tmp_path / "adapter"
    script(host, out, qlora=True)
    saved = {n: t for n, t in tensors(out).items() if ".gravity." in n and n.startswith("adapter")}
    assert saved and {tensor.dtype for tensor in saved.values()} == {torch.float32}
    losses = [entry["loss"] for entry in results(out)["training"]["losses"]]
    assert all(map(torch.isfinite, torch.tensor(losses))) and len(set(losses)) == 4
    # The full-precision host takes the adapter: its weights were only stored in 4 bits.
    assert gravity_modules(load_gravity_model(out).get_base_model())
