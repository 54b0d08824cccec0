"""The hosts of the experiments: ordinary folders, trained once, measured on text they never saw."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

EXPERIMENTS = Path(__file__).resolve().parents[2] / "scripts" / "experiments"
MODULES = ("pool", "lean_hosts", "lean_training", "pretrained_host")


@pytest.fixture(autouse=True)
def _on_the_path(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(EXPERIMENTS))
    yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half a megabyte whose last tenth has other letters than the rest."""
    file = tmp_path_factory.mktemp("text") / "letters.txt"
    file.write_text("abcdefgh " * 5000 + "uvwxyz. " * 625)
    return file


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory, text: Path) -> tuple[Path, str, list]:
    folder, data = tmp_path_factory.mktemp("hosts"), f"letters={text}"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXPERIMENTS))
        import lean_hosts

        made = lean_hosts.host_at(folder, preset="quick", seeds=(0, 1), data=data, length=128)
    return folder, data, made


def test_a_host_is_an_ordinary_folder(hosts):
    host = hosts[2][0]
    plain = AutoModelForCausalLM.from_pretrained(host.folder)
    ids = host.held_out(1)
    with torch.no_grad():
        assert torch.equal(plain(ids).logits, host.load()(ids).logits)
    assert plain.config.model_type == "llama" and plain.config._attn_implementation == "sdpa"


def test_it_has_learnt_and_its_seeds_differ(hosts):
    first, second = hosts[2]
    losses = first.record["training_losses"]["stage 1"]
    assert losses["12"] < losses["1"] - 0.5
    assert first.record["held_out_loss"] != second.record["held_out_loss"]


def test_what_is_held_out_was_not_trained_on(hosts):
    host = hosts[2][0]
    seen, held_out = (set(bytes(x.flatten().tolist()).decode()) for x in _windows(host))
    assert seen == set("abcdefgh ") and held_out == set("uvwxyz. ")


def _windows(host):
    return host.calibration(20), host.held_out(20)


def test_a_host_that_is_there_is_not_trained_again(hosts):
    import lean_hosts

    folder, data, made = hosts
    file = made[0].folder / "model.safetensors"
    before = file.stat().st_mtime_ns
    again = lean_hosts.host_at(folder, preset="quick", seeds=(0,), data=data, length=128)
    assert file.stat().st_mtime_ns == before and again[0].record == made[0].record


def test_a_host_trained_on_another_text_is_not_taken_for_this_one(hosts, tmp_path):
    import lean_hosts

    folder, _, _ = hosts
    other = tmp_path / "letters.txt"
    other.write_text("ABCDEFGH " * 5000)
    with pytest.raises(ValueError, match=r"trained with today's \['text'\]"):
        lean_hosts.host_at(folder, preset="quick", seeds=(0,), data=f"letters={other}", length=128)


def test_without_its_record_there_is_no_host(hosts, tmp_path):
    """A folder whose writing was cut short is trained again."""
    import lean_hosts

    settings = hosts[2][0].record["settings"]
    assert lean_hosts._known(tmp_path, settings) is None
    (tmp_path / "host.json").write_text(json.dumps(hosts[2][0].record))
    assert lean_hosts._known(tmp_path, settings) == hosts[2][0].record


def test_data_are_files_or_the_standard_library():
    import lean_hosts

    assert lean_hosts.text_of("stdlib") == ("stdlib", ())
    for data, message in (("stories", "NAME=FILE"), ("a=none.txt", "which are none")):
        with pytest.raises(ValueError, match=message):
            lean_hosts.text_of(data)
    with pytest.raises(ValueError, match="preset: expected one of"):
        lean_hosts.host_at("nowhere", preset="huge")
