"""Cards of a companion and of a prior name what they belong to, and their code runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hub.card_results import section, table
from hub.geolip_results import FEATURES, VERDICT, geolip
from huggingface_hub import ModelCard
from transformers import AutoImageProcessor, BertConfig, BertModel, ViTConfig, ViTModel

from gravity_hf import GeolipCompanion, GeolipConfig, GeolipPrior
from gravity_hf.hub.card_geolip_companion import results_of_companion
from gravity_hf.hub.cards import card_of_folder, model_card
from gravity_hf.training.tokenizers import byte_tokenizer

IS, LOADING = "What it is", "How to load it"
LIMITS = "What is not claimed, and what it cannot do"


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("host") / "small-host"
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=256, num_hidden_layers=2, **sizes)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def companion(host: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("companion") / "model"
    settings = GeolipConfig(**FEATURES, verdict=VERDICT)
    made = GeolipCompanion.from_host(str(host), settings, read_layer=1, write="residual")
    with torch.no_grad():
        made.writer.gate.fill_(0.25)
    made.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def prior(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prior") / "model"
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    made = GeolipPrior.for_geolip(geolip(), 5, **sizes)
    made.config.geolip_name_or_path = "me/geolip"
    made.save_pretrained(folder)
    return folder


def run_code(card: ModelCard, **replaced: str) -> dict[str, Any]:
    code = re.search(r"```python\n(.*?)```", section(card, LOADING), re.DOTALL)
    assert code is not None
    text = code[1]
    for old, new in replaced.items():
        text = text.replace(old, new)
    names: dict[str, Any] = {}
    exec(text, names)
    return names


def test_the_card_names_the_host_and_not_where_it_lay(companion: Path, host: Path) -> None:
    card = card_of_folder(companion, "me/companion")
    cells = dict(table(section(card, IS)))
    assert cells["host"] == "`small-host`" and cells["type of the host"] == "bert"
    assert cells["weights of the host"] == "elsewhere; not in this folder"
    assert str(host.parent) not in str(card) and card.data.base_model is None
    assert "h' = h + tanh(gate) W(S)" in re.sub(" +", " ", section(card, "What it computes"))
    assert cells["writes back"] == f"residual; tanh(gate) is {torch.tensor(0.25).tanh():.3g}"
    assert card.data.tags == ["geolip_companion"]


def test_the_verdict_of_the_geolip_inside_is_that_of_the_card(companion: Path) -> None:
    card = card_of_folder(companion, "me/companion")
    rows = {row[0]: row[1:] for row in table(section(card, "What was measured"))}
    assert rows["frames inside the envelope"] == ["99.75%", "98.52%"]
    assert "for a task of the host was not measured" in section(card, LIMITS)


def test_parameters_are_those_that_the_folder_holds(companion: Path) -> None:
    loaded = GeolipCompanion.from_pretrained(companion)
    own = sum(p.numel() for n, p in loaded.named_parameters() if not n.startswith("host."))
    assert results_of_companion(companion)["parameters"] == own


def test_code_of_a_companion_runs(companion: Path, host: Path) -> None:
    names = run_code(card_of_folder(companion, str(companion)), HOST=str(host))
    assert names["output"].omega_attended.shape[::2] == (1, 12)


def test_code_of_a_trained_host_asks_for_no_other(host: Path, tmp_path: Path) -> None:
    made = GeolipCompanion.from_host(str(host), GeolipConfig(**FEATURES), train_host=True)
    made.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    card = card_of_folder(tmp_path, str(tmp_path))
    assert run_code(card)["output"].omega_attended.shape[::2] == (1, 12)
    assert "HOST" not in section(card, LOADING)


# A stand-in has this where a library is missing: of older transformers torchvision.
@pytest.mark.skipif(hasattr(AutoImageProcessor, "_backends"), reason="needs torchvision")
def test_code_of_a_host_of_images_reads_an_image(tmp_path: Path) -> None:
    sizes = {"hidden_size": 12, "num_attention_heads": 2, "intermediate_size": 16}
    sizes |= {"num_hidden_layers": 1, "image_size": 8, "patch_size": 4}
    host = ViTModel(ViTConfig(**sizes))
    GeolipCompanion.from_host(host, GeolipConfig(**FEATURES)).save_pretrained(tmp_path / "model")
    host.save_pretrained(tmp_path / "host")
    kind = getattr(transformers, "ViTImageProcessorPil", transformers.ViTImageProcessor)
    kind(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "host")
    card = card_of_folder(tmp_path / "model", str(tmp_path / "model"))
    names = run_code(card, HOST=str(tmp_path / "host"))
    # A token for the class, and 2 x 2 patches.
    assert names["output"].omega_attended.shape == (1, 5, 12)
    assert "a host whose name is not recorded" in str(card) and "has no name here" in str(card)


def test_nothing_is_said_that_the_settings_lack(companion: Path) -> None:
    results = results_of_companion(companion)
    plain = {**FEATURES, "use_spectral": False, "feature_norm": "none", "frame_sign": "canon"}
    config = {**results["config"], "geolip": plain}
    text = str(model_card({**results, "config": config, "layers": []}, "me/companion"))
    assert "attend to each other" not in text and "after attention" not in text
    said = section(ModelCard(text), "What it computes")
    assert "normalised" not in said and "Rows are turned" in said


def test_a_host_of_the_hub_is_the_base_model(companion: Path) -> None:
    results = results_of_companion(companion)
    config = {**results["config"], "host_name_or_path": "maker/host"}
    card = model_card({**results, "config": config, "host_on_hub": True}, "me/companion")
    assert card.data.base_model == "maker/host"
    loading = section(card, LOADING)
    assert 'AutoTokenizer.from_pretrained("maker/host")' in loading and "HOST" not in loading


def test_a_prior_names_its_geolip_and_claims_nothing(prior: Path) -> None:
    card = card_of_folder(prior, "me/prior")
    assert dict(table(section(card, IS)))["geolip"] == "`me/geolip`"
    made = GeolipPrior.from_pretrained(prior)
    assert dict(table(section(card, IS)))["parameters"] == f"{made.num_parameters():,}"
    assert "Nothing was measured" in section(card, "What was measured")
    assert card.data.eval_results is None


def test_code_of_a_prior_runs(prior: Path) -> None:
    names = run_code(card_of_folder(prior, str(prior)))
    assert names["frames"].shape == (2, 5, 8, 4)
