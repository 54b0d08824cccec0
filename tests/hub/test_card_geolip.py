"""A card of a geolip says what its config, its tensors, its verdict and its record say, and no
more; its code runs as it stands there."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.card_results import section, table
from hub.geolip_results import DRIFTED, ENGAGED, IMAGES, RECORD, VERDICT, geolip, trained_folder
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file

from gravity_hf import GeolipConfig, GeolipImageProcessor
from gravity_hf.hub.card_geolip import results_of_geolip
from gravity_hf.hub.card_geolip_law import constants, law_text
from gravity_hf.hub.cards import card_of_folder, model_card, write_card

ROOT = Path(__file__).resolve().parents[2]
LIMITS = "What is not claimed, and what it cannot do"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    host = {"name_or_path": "/home/me/hosts/minilm", "layer": -1}
    folder = trained_folder(tmp_path_factory.mktemp("geolip") / "plain", host_config=host)
    (folder / "results.json").write_text(json.dumps(RECORD))
    return folder


@pytest.fixture(scope="module")
def card(saved: Path) -> ModelCard:
    return card_of_folder(saved, "me/geolip")


def rendered(saved: Path, **changes: Any) -> ModelCard:
    """The card of the same model with other settings."""
    results = results_of_geolip(saved)
    return model_card({**results, "config": {**results["config"], **changes}}, "x")


def run_code(card: ModelCard) -> dict[str, Any]:
    code = re.search(r"```python\n(.*?)```", section(card, "How to load it"), re.DOTALL)
    assert code is not None
    names: dict[str, Any] = {}
    exec(code[1], names)
    return names


def test_the_verdict_stands_beside_random_frames(card: ModelCard) -> None:
    rows = {row[0]: row[1:] for row in table(section(card, "What was measured"))}
    assert rows["cosine of reconstruction, mean over tokens"] == ["0.9518", "–"]
    assert rows["deviation, farthest from 0"] == ["0.0612", "0.0587"]
    assert rows["frames inside the envelope"] == ["99.75%", "98.52%"]
    assert rows["alpha at the start"] == ["0.0238", "–"]
    assert rows["mechanism"] == ["B", "–"]
    (result,) = card.data.eval_results
    assert result.metric_value == VERDICT["recon_cosine"]
    assert result.dataset_name == RECORD["training"]["data"]


def test_parameters_and_alphas_come_from_the_tensors(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "moved"))
    tensors = load_file(folder / "model.safetensors")
    logits = tensors["spectral.layers.1.alpha_logits"]
    logits[3], logits[5] = 1.0, -4.0
    tensors["lens.basis"][0, 0] += 0.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    card = card_of_folder(folder, "x")
    assert (
        dict(table(section(card, "What it is")))["parameters"] == f"{geolip().num_parameters():,}"
    )
    *_, last = table(section(card, "What it computes"))
    low, high = (0.2 * torch.tensor([-4.0, 1.0]).sigmoid()).tolist()
    assert last == ["`spectral.layers.1`", "12", f"{low:.4g} / 0.02384 / {high:.4g}"]
    basis = tensors["lens.basis"].double()
    error = (basis.T @ basis - torch.eye(4, dtype=torch.float64)).abs().max()
    assert f"is {error:.1e}." in section(card, "What it computes")


def test_a_learned_lens_counts_and_is_measured_as_it_is_used(tmp_path: Path) -> None:
    model = geolip(lens_mode="learned")
    with torch.no_grad():
        model.lens.basis.mul_(3.0)
    model.save_pretrained(tmp_path)
    results = results_of_geolip(tmp_path)
    assert results["parameters"] == model.num_parameters()
    assert results["lens_error"] < 1e-6


@pytest.mark.parametrize(
    ("verdict", "words"),
    [
        (ENGAGED, "Mechanism A: attention between tokens is used"),
        (VERDICT, "Mechanism B: no use of attention between tokens is shown"),
        (DRIFTED, "which is drift"),
        (None, "Nothing was measured: the config holds no verdict"),
    ],
    ids=["A", "B", "drift", "none"],
)
def test_the_mechanism_is_the_one_of_the_verdict(
    verdict: dict[str, Any] | None, words: str, saved: Path
) -> None:
    card = rendered(saved, verdict=verdict)
    assert words in section(card, "What was measured")
    useless = "did next to nothing" in section(card, LIMITS)
    assert useless == (verdict in (VERDICT, DRIFTED))


def test_what_is_not_claimed_is_said(saved: Path, card: ModelCard) -> None:
    text = section(card, LIMITS)
    assert "of random frames of this size 98.5% lie inside, too" in text
    assert "is no result of training" in text and "PCA" in text and "not claimed" in text
    assert "sees both ways" in text
    alone = section(rendered(saved, use_spectral=False, lens_dim=8), LIMITS)
    assert "Tokens do not see each other" in alone and "fewer than the 10" in alone
    assert "sees both ways" not in alone


def test_a_verdict_without_a_record_is_not_vouched_for(saved: Path, tmp_path: Path) -> None:
    geolip(verdict=VERDICT).save_pretrained(tmp_path)
    told = "who measured them, and on what, is not said"
    assert told in section(card_of_folder(tmp_path, "x"), "What was measured")
    assert told not in section(rendered(saved), "What was measured")


def test_without_a_verdict_no_number_is_claimed(saved: Path) -> None:
    results = {**results_of_geolip(saved), "conditions": None}
    card = model_card({**results, "config": {**results["config"], "verdict": None}}, "x")
    assert card.data.eval_results is None and "None" not in str(card)
    for title in ("What was measured", LIMITS):
        assert not re.search(r"\d\.\d", section(card, title))


def test_how_it_was_made_is_the_record_without_a_path(saved: Path) -> None:
    results = {**results_of_geolip(saved), "training": None}
    assert "not recorded" in section(model_card(results, "x"), "How it was made")
    card = card_of_folder(saved, "x")
    made = section(card, "How it was made")
    assert "60 steps of 16 texts, drawn from 90; 10 were held out" in made
    assert "learning rate 0.002 after 30 steps" in made and "deviation 0.5" in made
    assert ["features of", "`minilm`, the last layer"] in table(section(card, "What it is"))
    assert "/home" not in str(card)


def test_gravity_between_spectra_is_said_and_tagged(saved: Path, card: ModelCard) -> None:
    gravity = rendered(saved, spectral_attention="gravity")
    assert gravity.data.tags == ["gravity-attention", "geolip"] and card.data.tags == ["geolip"]
    assert "gravity, law power" in section(gravity, "What it computes")
    assert "dot products" in section(card, "What it computes")


def test_letters_stand_where_they_are_used() -> None:
    settings = GeolipConfig(patch_dim=12, use_spectral=False, lens_mode="learned")
    assert "alpha" not in law_text(settings) and "alpha" not in constants(settings)
    assert "[32, 16], learned" in law_text(settings)


def test_code_for_features_runs(saved: Path) -> None:
    names = run_code(card_of_folder(saved, str(saved)))
    assert names["output"].reconstruction.shape == (1, 12, 12)
    assert "# [1, 12, 12], spectra" in str(card_of_folder(saved, str(saved)))


@pytest.mark.parametrize("with_processor", [True, False])
def test_code_for_images_runs(with_processor: bool, tmp_path: Path) -> None:
    model = geolip(**IMAGES)
    model.save_pretrained(tmp_path)
    if with_processor:
        GeolipImageProcessor.from_config(model.config).save_pretrained(tmp_path)
    card = card_of_folder(tmp_path, str(tmp_path))
    assert ("GeolipImageProcessor" in card.text) == with_processor
    names = run_code(card)
    assert names["output"].pixel_reconstruction.shape == (1, 3, 8, 8)
    assert names["output"].omega_attended.shape == (1, 4, 12)
    assert "# [1, 3, 8, 8]" in card.text and "# [1, 4, 12]" in card.text


def test_a_card_can_be_made_of_its_results_alone(saved: Path, tmp_path: Path) -> None:
    file = tmp_path / "geolip.results.json"
    file.write_text(json.dumps(results_of_geolip(saved)))
    write_card(file, tmp_path / "geolip.md", name="x")
    assert (tmp_path / "geolip.md").read_text() == str(card_of_folder(saved, "x"))
    with pytest.raises(ValueError, match="results of a geolip with its config, got none"):
        model_card({"model_type": "geolip"}, "x")


def test_the_script_keeps_the_card_of_a_trained_folder(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("make_cards", ROOT / "scripts/make_cards.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    # Where dataclasses look for the module of a class.
    monkeypatch.setitem(sys.modules, spec.name, script)
    spec.loader.exec_module(script)
    monkeypatch.setattr(script, "CARDS", tmp_path)
    arguments = ["--model", str(saved), "--allow-uncommitted", "--work", str(tmp_path / "work")]
    script.main(["geolip", *arguments])
    assert "0.9518" in (tmp_path / "plain.md").read_text()
    assert "/home" not in (tmp_path / "plain.results.json").read_text()
    with pytest.raises(SystemExit, match="expected a folder with a model of type ngt, got"):
        script.main(["ngt", *arguments])
