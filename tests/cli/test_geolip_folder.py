"""What the verbs make of the folders of a geolip, of a companion, and of a prior."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cli.commands import run
from hub.geolip_results import VERDICT, geolip, samples, trained_folder
from safetensors.torch import save_file
from transformers import BertConfig, BertModel

from gravity_hf import GeolipCompanion, GeolipPrior, patch_with_gravity
from gravity_hf.viz.geolip.writing import geolip_of_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained_folder(tmp_path_factory.mktemp("geolip") / "model")


@pytest.fixture(scope="module")
def companion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("companion") / "model"
    sizes = {"hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 16}
    host = BertModel(BertConfig(vocab_size=32, num_hidden_layers=1, **sizes))
    made = GeolipCompanion.from_host(host, geolip(verdict=VERDICT))
    made.config.host_name_or_path = "maker/host"
    made.save_pretrained(folder)
    save_file(samples(geolip()), folder / "samples.safetensors")
    return folder


def said(*arguments: object) -> str:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    return " ".join(result.output.split())


def test_status_shows_lens_verdict_and_alphas(folder: Path) -> None:
    text = said("status", folder)
    assert "GeolipForReconstruction, without gravity" in text
    assert "features of width 12, frames of 8 x 4" in text and "lens of 12 x 4, fixed" in text
    assert "largest entry of E^T E - 1 is 2" in text and "e-08" in text
    assert "cosine of reconstruction 0.9518" in text and "random frames: 98.5 %" in text
    assert "mechanism B: no use of attention between tokens is shown" in text
    assert "spectral.layers.1 12 0.02384 0.02384 0.02384" in text
    assert f"gravity-hf figures {folder}" in text.replace(" /", "/").replace(
        "figures/", "figures /"
    )


def test_status_of_gravity_between_spectra_says_so(tmp_path: Path) -> None:
    geolip(spectral_attention="gravity").save_pretrained(tmp_path)
    text = said("status", tmp_path)
    assert "gravity from the start" in text and "gravity between spectra, law power" in text
    assert "no verdict is recorded" in text


@pytest.mark.parametrize("option", [("--prompt", "x"), ("--layer", 0), ("--interactive",)])
def test_options_of_hosts_are_refused(option: tuple[object, ...], folder: Path) -> None:
    result = run("figures", folder, *option)
    text = " ".join(result.output.split())
    assert result.exit_code == 2 and f"{option[0]}: expected none for a geolip" in text
    assert not (folder / "figures").exists()


def test_a_companion_names_its_host(companion: Path) -> None:
    text = said("status", companion)
    assert "companion of maker/host (bert), whose weights are elsewhere" in text
    assert "reads layer -1; it reads, and writes nothing back" in text
    assert "cosine of reconstruction 0.9518" in text and "geolip.spectral.layers.0 12" in text


def test_figures_of_a_companion_need_neither_its_host_nor_a_text(
    companion: Path, tmp_path: Path
) -> None:
    inner, batch = geolip_of_folder(companion), samples(geolip())
    with torch.no_grad():
        assert torch.equal(inner(**batch).omega_attended, geolip()(**batch).omega_attended)
    text = said("figures", companion, "-o", tmp_path / "out")
    assert "spectra.png" in text and "deviations.png" in text and "alphas.png" in text
    assert (tmp_path / "out" / "figures.json").is_file()


def test_a_prior_names_its_geolip(tmp_path: Path) -> None:
    prior = GeolipPrior.for_geolip(geolip(), 5, hidden_size=16, num_hidden_layers=1)
    prior.config.geolip_name_or_path = "me/geolip"
    prior.save_pretrained(tmp_path)
    text = said("status", tmp_path)
    assert "GeolipPrior, without gravity" in text and "the decoder of me/geolip" in text
    assert "codes of 5 tokens with frames of 8 x 4" in text
    result = run("figures", tmp_path)
    assert result.exit_code == 2 and "holds a geolip_prior" in " ".join(result.output.split())


def test_there_is_nothing_to_convert(folder: Path, tmp_path: Path) -> None:
    result = run("convert", folder, tmp_path / "out")
    text = " ".join(result.output.split())
    assert result.exit_code == 2 and "there is nothing to convert" in text
    with pytest.raises(TypeError, match="its tokens are frames on a sphere. Convert the host"):
        patch_with_gravity(geolip())
