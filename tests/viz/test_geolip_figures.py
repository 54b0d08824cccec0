"""Figures of a geolip show what its forward pass gives, with random frames beside its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.geolip_results import IMAGES, geolip, history, samples, trained_folder
from torch.nn.functional import cosine_similarity

from gravity_hf.viz.geolip import write_geolip_figures, write_geolip_folder_figures
from gravity_hf.viz.geolip.alphas import alphas_figure
from gravity_hf.viz.geolip.deviations import deviations_figure
from gravity_hf.viz.geolip.measuring import look
from gravity_hf.viz.geolip.writing import drawings_of
from gravity_hf.viz.style import LIGHT

NAMES = ["reconstructions", "spectra", "spectra-sample", "alphas", "deviations"]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = trained_folder(tmp_path_factory.mktemp("geolip") / "model")
    return folder, write_geolip_folder_figures(folder)


def test_a_folder_needs_nothing_but_itself(drawn: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, entries = drawn
    assert [entry["name"] for entry in entries] == NAMES
    there = folder / "figures"
    assert json.loads((there / "figures.json").read_text(encoding="utf-8")) == entries
    assert all((there / e["file"]).read_bytes().startswith(b"\x89PNG") for e in entries)
    assert "alpha over the training" in entries[3]["title"]


def test_what_is_shown_is_what_the_model_gives() -> None:
    model = geolip()
    batch = samples(model)
    valid = batch["attention_mask"].bool()
    with torch.no_grad():
        output = model(**batch)
    seen = look(model, [batch])
    assert torch.equal(seen.before, output.omega[valid])
    assert torch.equal(seen.after, output.omega_attended[valid])
    assert len(seen.deviations) == len(seen.random_deviations) == 14 and seen.first == 5
    assert torch.isclose(seen.deviations.mean(), output.frame_deviation.double())
    assert torch.isclose(seen.cosines.mean(), output.recon_cosine)
    assert model.training is False


def test_a_sample_without_tokens_is_passed_over() -> None:
    model = geolip()
    batch = samples(model)
    batch["attention_mask"][0] = 0
    seen = look(model, [batch])
    assert seen.first == 5 and len(seen.before) == 9


def test_a_noisy_image_stands_between_the_clean_one_and_what_is_made_of_it() -> None:
    model = geolip(**IMAGES)
    clean = samples(model)["pixel_values"]
    noisy = clean + 1
    seen = look(model, [{"pixel_values": noisy, "labels": clean}])
    assert seen.pictures is not None and seen.pictures.given is not None
    assert torch.equal(seen.pictures.clean, clean) and torch.equal(seen.pictures.given, noisy)
    made = model.patchify(seen.pictures.reconstructed).flatten(0, 1)
    exact = cosine_similarity(made, model.patchify(clean).flatten(0, 1), dim=-1)
    assert torch.allclose(seen.cosines, exact, atol=1e-5)
    plain = look(model, [{"pixel_values": clean, "labels": clean.clone()}])
    assert plain.pictures is not None and plain.pictures.given is None


def test_shares_inside_the_envelope_are_those_of_the_frames_and_of_random_ones() -> None:
    seen = look(geolip(), [samples(geolip())])
    inside = 100 * float((seen.random_deviations.abs() < seen.critical).double().mean())
    drawing = deviations_figure(seen)
    assert f"{inside:.1f} % of them" in drawing.caption
    text = drawing.svg(LIGHT)
    assert "random frames, as many" in text and "this model" in text and "envelope" in text


def test_without_spectral_layers_no_alphas_are_drawn() -> None:
    model = geolip(use_spectral=False)
    names = [drawing.name for drawing in drawings_of(look(model, [samples(model)]))]
    assert names == [name for name in NAMES if name != "alphas"]


def test_a_history_stands_in_the_picture_with_its_bounds() -> None:
    model = geolip()
    with_history = alphas_figure(look(model, [samples(model)], history(model)))
    without = alphas_figure(look(model, [samples(model)]))
    assert "over the training" in with_history.title and "training" not in without.title
    assert "0.02384" in without.caption and "0 and 0.2" in without.caption
    assert ">step<" in with_history.svg(LIGHT) and ">mode<" in without.svg(LIGHT)


def test_what_cannot_be_drawn_says_so(tmp_path: Path) -> None:
    model = geolip()
    with pytest.raises(ValueError, match="at least one valid token"):
        write_geolip_figures(model, [], tmp_path / "out")
    with pytest.raises(ValueError, match=r"steps \[S\] and alphas"):
        write_geolip_figures(
            model,
            [samples(model)],
            tmp_path / "out",
            history={"steps": torch.arange(3), "alphas": torch.zeros(2, 2, 12)},
        )
    assert not (tmp_path / "out").exists()
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="samples.safetensors"):
        write_geolip_folder_figures(tmp_path / "bare")
