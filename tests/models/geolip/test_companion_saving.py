"""A companion as a folder: without its host, and with nothing loaded beside another one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, PreTrainedModel, T5Config, T5EncoderModel

from gravity_hf import GeolipCompanion, GeolipCompanionConfig

from .companion_cases import (
    HOSTS,
    INNER,
    SPECIAL,
    companion_of,
    host_named,
    inputs_of,
    last_state,
)


@pytest.fixture(scope="module")
def named_host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("host")
    host_named("bert").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved(named_host: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a companion that writes, beside a host with a name."""
    folder = tmp_path_factory.mktemp("companion")
    writing = {"write": "residual", "read_layer": INNER, "gate": 1.0}
    companion_of(AutoModel.from_pretrained(named_host), **writing).save_pretrained(folder)
    return folder


def test_encoder_that_was_saved_by_itself_is_found_again(tmp_path: Path) -> None:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    T5EncoderModel(T5Config(vocab_size=40, **sizes)).save_pretrained(tmp_path / "host")
    host = T5EncoderModel.from_pretrained(tmp_path / "host")
    companion = companion_of(host, read_layer=INNER)
    companion.save_pretrained(tmp_path / "companion")
    loaded = GeolipCompanion.from_pretrained(tmp_path / "companion").eval()
    inputs = inputs_of("bert")
    assert torch.equal(companion(**inputs).omega, loaded(**inputs).omega)


def test_host_of_a_folder_is_found_from_any_other(
    named_host: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(named_host.parent)
    companion_of(AutoModel.from_pretrained(named_host.name)).save_pretrained(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert GeolipCompanion.from_pretrained(tmp_path).host is not None


@pytest.mark.parametrize("name", HOSTS)
def test_saved_companion_computes_the_same(name: str, tmp_path: Path) -> None:
    companion = companion_of(name, write="residual", read_layer=INNER, gate=1.0)
    companion.save_pretrained(tmp_path)
    loaded = GeolipCompanion.from_pretrained(tmp_path, host=host_named(name))
    inputs = inputs_of(name)
    before, after = companion(**inputs), loaded(**inputs)
    assert torch.equal(after.last_hidden_state, before.last_hidden_state)
    assert torch.equal(after.reconstruction, before.reconstruction)


def test_no_weight_of_the_host_is_saved(saved: Path) -> None:
    assert sorted(file.name for file in saved.iterdir()) == ["config.json", "model.safetensors"]
    first = {name.partition(".")[0] for name in load_file(saved / "model.safetensors")}
    assert first == {"geolip", "writer"}


def test_weights_that_join_the_host_later_are_not_saved(tmp_path: Path) -> None:
    companion = companion_of("bert")
    companion.host.adapter = torch.nn.Linear(2, 2)
    companion.save_pretrained(tmp_path)
    assert not [name for name in load_file(tmp_path / "model.safetensors") if "adapter" in name]


def test_auto_model_loads_companion_and_host(saved: Path, named_host: Path) -> None:
    loaded = AutoModel.from_pretrained(saved)
    assert type(loaded) is GeolipCompanion
    given = GeolipCompanion.from_pretrained(saved, host=AutoModel.from_pretrained(named_host))
    inputs = inputs_of("bert")
    assert torch.equal(last_state(loaded, **inputs), last_state(given, **inputs))


def test_settings_come_back(saved: Path, named_host: Path) -> None:
    config = AutoConfig.from_pretrained(saved)
    assert isinstance(config, GeolipCompanionConfig)
    found = (config.host_name_or_path, config.host_model_type, config.read_layer, config.write)
    assert found == (str(named_host), "bert", INNER, "residual")
    assert config.special_token_ids == SPECIAL
    assert config.geolip.to_dict() == companion_of("bert").config.geolip.to_dict()


def test_file_holds_no_settings_that_mean_nothing(saved: Path) -> None:
    settings = json.loads((saved / "config.json").read_text())
    assert "id2label" not in settings["geolip"]


def _narrow() -> PreTrainedModel:
    return host_named("bert", hidden_size=8)


@pytest.mark.parametrize(
    ("other", "message"), [(_narrow, "dimensions"), (lambda: host_named("gpt2"), "of type 'bert'")]
)
def test_another_host_is_refused_before_anything_is_loaded(
    other: Any, message: str, saved: Path, tmp_path: Path
) -> None:
    config = (saved / "config.json").read_text()
    # No weights lie there: whoever looked for them would fail otherwise.
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(ValueError, match=message):
        GeolipCompanion.from_pretrained(tmp_path, host=other())


def test_another_host_under_the_name_is_refused(saved: Path, tmp_path: Path) -> None:
    _narrow().save_pretrained(tmp_path / "host")
    settings = json.loads((saved / "config.json").read_text())
    settings["host_name_or_path"] = str(tmp_path / "host")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="dimensions"):
        GeolipCompanion.from_pretrained(tmp_path)


def test_host_that_is_not_found_is_asked_for(saved: Path, tmp_path: Path) -> None:
    settings = json.loads((saved / "config.json").read_text())
    settings["host_name_or_path"] = str(tmp_path / "gone")
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(OSError, match="host=model"):
        GeolipCompanion.from_pretrained(tmp_path)


def test_companion_of_a_nameless_host_asks_for_it(tmp_path: Path) -> None:
    companion_of("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="host=model"):
        GeolipCompanion.from_pretrained(tmp_path)
    assert GeolipCompanion.from_pretrained(tmp_path, load_host=False).host is None


def test_trained_host_lies_in_the_folder(tmp_path: Path) -> None:
    companion = companion_of("bert", write="residual", gate=1.0, train_host=True)
    with torch.no_grad():
        companion.host.encoder.layer[0].output.dense.weight += 0.1
    companion.save_pretrained(tmp_path)
    loaded = GeolipCompanion.from_pretrained(tmp_path)
    inputs = inputs_of("bert")
    assert torch.equal(last_state(loaded, **inputs), last_state(companion, **inputs))
    with pytest.raises(ValueError, match="Leave it out"):
        GeolipCompanion.from_pretrained(tmp_path, host=host_named("bert"))


def test_half_precision_keeps_the_lens(saved: Path) -> None:
    loaded = GeolipCompanion.from_pretrained(saved, dtype=torch.bfloat16)
    assert loaded.host.dtype == loaded.writer.proj.weight.dtype == torch.bfloat16
    assert loaded.geolip.lens.basis.dtype == loaded.geolip.feature_std.dtype == torch.float32
    out = loaded(**inputs_of("bert"))
    assert out.last_hidden_state.dtype == torch.bfloat16
    assert bool(out.last_hidden_state.isfinite().all())


def test_misspelt_setting_is_an_error() -> None:
    with pytest.raises(ValueError, match="read_layer"):
        GeolipCompanionConfig(read_layr=2)


def test_unknown_way_to_write_is_an_error() -> None:
    with pytest.raises(StrictDataclassError, match="expected one of"):
        GeolipCompanionConfig(write="all")
