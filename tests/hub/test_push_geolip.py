"""A geolip, its companion and its prior go to the Hub in one commit, and come back as they were."""

from __future__ import annotations

from pathlib import Path

import torch
from hub.geolip_results import VERDICT, geolip, samples, trained_folder
from hub.loopback import LoopbackHub
from huggingface_hub import ModelCard
from transformers import BertConfig, BertModel

from gravity_hf import (
    GeolipCompanion,
    GeolipCompanionConfig,
    GeolipPrior,
    gravity_status,
    load_gravity_model,
    push_gravity_model,
)
from gravity_hf.hub.extras import Extras
from gravity_hf.hub.staging import staged


def card_on(hub: LoopbackHub, name: str) -> ModelCard:
    return ModelCard(hub.repo(name).tree("main")["README.md"].content.decode())


def test_push_to_hub_is_one_commit_with_a_card_of_the_verdict(hub: LoopbackHub) -> None:
    model = geolip(verdict=VERDICT)
    model.push_to_hub("me/geolip", tags="mine", commit_message="m")
    repo = hub.repo("me/geolip")
    assert repo.messages == ["initial commit", "m"]
    assert {"config.json", "model.safetensors", "README.md"} <= repo.paths()
    assert "modeling_gravity.py" not in repo.paths()
    card = card_on(hub, "me/geolip")
    assert {"mine", "geolip"} <= set(card.data.tags) and "0.9518" in card.text
    again = load_gravity_model("me/geolip").eval()
    batch = samples(model)
    assert type(again) is type(model) and again.config.verdict == VERDICT
    assert torch.equal(again(**batch).reconstruction, model(**batch).reconstruction)


def test_a_trained_folder_goes_up_with_its_figures(tmp_path: Path) -> None:
    folder = trained_folder(tmp_path / "model")
    (folder / "figures").mkdir()
    (folder / "figures" / "alphas.png").write_bytes(b"\x89PNG")
    plan = push_gravity_model(folder, "me/geolip", dry_run=True)
    paths = {file.path for file in plan.files}
    assert {"README.md", "model.safetensors", "figures/alphas.png"} <= paths
    assert "masses" not in str(plan) and "gravity block" not in str(plan)


def test_inputs_and_curves_of_a_training_stay_at_home(tmp_path: Path) -> None:
    folder = trained_folder(tmp_path / "model")
    (folder / "runs").mkdir()
    (folder / "runs" / "events.machine").write_text("x")
    plan = push_gravity_model(folder, "me/geolip", dry_run=True)
    assert not {"samples.safetensors", "runs/events.machine"} & {f.path for f in plan.files}
    assert "left out: runs/, samples.safetensors" in plan.notices


def test_a_card_that_was_written_by_hand_stays(tmp_path: Path) -> None:
    folder = trained_folder(tmp_path / "model")
    (folder / "README.md").write_text("---\ntags: [geolip]\n---\nmine\n")
    with staged(folder, "me/geolip", Extras(), online=False) as laid_out:
        assert laid_out.files["README.md"] == folder / "README.md"
        assert not any("README" in notice for notice in laid_out.notices)


def test_a_host_that_nobody_else_has_is_told(tmp_path: Path) -> None:
    (tmp_path / "host").mkdir()
    where = str(tmp_path / "host")
    settings = geolip(host_config={"name_or_path": where, "layer": -1}).config
    made = GeolipCompanion(GeolipCompanionConfig(geolip=settings, host_name_or_path=where))
    made.save_pretrained(tmp_path / "model")
    plan = push_gravity_model(tmp_path / "model", "me/x", dry_run=True, tokenizer=None)
    named = {notice.split()[2] for notice in plan.notices if "a folder of this machine" in notice}
    assert named == {"host_name_or_path", "geolip.host_config.name_or_path"}


def test_a_companion_and_a_prior_go_up_without_the_host(tmp_path: Path, hub: LoopbackHub) -> None:
    sizes = {"hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 16}
    host = BertModel(BertConfig(vocab_size=32, num_hidden_layers=1, **sizes)).eval()
    companion = GeolipCompanion.from_host(host, geolip().config).eval()
    companion.push_to_hub("me/companion")
    ids = torch.arange(6)[None]
    again = GeolipCompanion.from_pretrained("me/companion", host=host).eval()
    assert torch.equal(again(input_ids=ids).omega, companion(input_ids=ids).omega)
    assert "geolip_companion" in card_on(hub, "me/companion").data.tags
    prior = GeolipPrior.for_geolip(geolip(), 5, hidden_size=16, num_hidden_layers=1)
    push_gravity_model(prior, "me/prior")
    loaded = load_gravity_model("me/prior")
    assert torch.equal(loaded.sample(1, seed=0, steps=2), prior.sample(1, seed=0, steps=2))


def test_the_status_in_python_says_whether_spectra_attend_by_gravity() -> None:
    plain, gravity = gravity_status(geolip()), gravity_status(geolip(spectral_attention="gravity"))
    assert not plain.is_gravity and plain.skipped == ("spectral.layers.0", "spectral.layers.1")
    assert gravity.is_gravity and gravity.layers == plain.skipped and not gravity.skipped
    # A strength and a softening for each of 4 heads in 2 layers.
    assert gravity.parameters == 16
    companion = GeolipCompanion(GeolipCompanionConfig(geolip=geolip().config))
    assert gravity_status(companion).skipped == tuple(f"geolip.{name}" for name in plain.skipped)
    assert "dot products of spectra" in str(plain) and "gravity between spectra" in str(gravity)
