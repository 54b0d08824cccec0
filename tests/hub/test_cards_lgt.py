"""A card of LGT says what its config, its tensors and its results say, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hub.card_results import section, table, upload
from hub.lgt_results import RESULTS, SIZES, results, saved_lgt
from hub.loopback import LoopbackHub
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from gravity_hf.hub.card_lgt import results_of_lgt
from gravity_hf.hub.card_lgt_law import constants, law_text
from gravity_hf.hub.cards import card_of_folder, model_card, write_card
from gravity_hf.models.lgt import LGTConfig


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_lgt(tmp_path_factory.mktemp("lgt") / "plain")


@pytest.fixture
def measured(saved: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(saved, tmp_path / "measured"))
    (folder / "results.json").write_text(json.dumps(RESULTS))
    return folder


def of_config(**changes: Any) -> dict[str, Any]:
    """Results of a model with these settings."""
    config = json.loads(LGTConfig(**{**SIZES, **changes}).to_json_string(use_diff=False))
    return results(config=config | {"architectures": ["LGTForCausalLM"]})


def limits_of(**changes: Any) -> str:
    return section(model_card(of_config(**changes), "x"), "What it cannot do")


def test_parameters_and_constants_come_from_the_tensors(saved: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(saved)
    card = card_of_folder(saved, "me/plain")
    cells = dict(table(section(card, "What it is")))
    assert cells["parameters"] == f"{model.num_parameters():,}"
    assert cells["layers, heads"] == "2, 2" and cells["width, of positions"] == "16, 8"
    header, first, second = table(section(card, "The law"))
    assert first[:2] == ["`model.layers.0`", "2"]
    strengths = load_file(saved / "model.safetensors")["model.layers.1.attn.gravity.G"].abs()
    low, high = strengths.min().item(), strengths.max().item()
    assert second[2] == f"{low:.4g} / {strengths.mean().item():.4g} / {high:.4g}"


def test_a_fixed_basis_is_no_parameter(tmp_path: Path) -> None:
    folder = saved_lgt(tmp_path / "fractal", position_type="fractal", tie_word_embeddings=True)
    count = AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    assert results_of_lgt(folder)["parameters"] == count
    assert f"| {count:,} |" in card_of_folder(folder, "x").text


def test_nothing_measured_nothing_claimed(saved: Path) -> None:
    card = card_of_folder(saved, "me/plain")
    assert card.data.eval_results is None and card.data.model_name is None
    for title in ("What was measured", "How it was made", "What it cannot do"):
        assert not re.search(r"\d\.\d", section(card, title))
    assert "Nothing was measured" in card.text and "How it was made is not recorded" in card.text
    assert "quality was not measured" in card.text and "None" not in str(card)


def test_every_measured_cell_is_that_of_the_results(measured: Path) -> None:
    rows = {row[0]: row[1:] for row in table(section(card_of_folder(measured, "x"), MEASURED))}
    assert rows["unigram"] == ["31", "4.7500", "–"]
    assert rows["softmax"] == ["12,345", "2.3125 ± 0.0884", "2"]
    assert rows["**LGT: this model**"] == ["6,789", "2.6875 ± 0.0884", "2"]


MEASURED = "What was measured"


def test_losing_is_said(measured: Path) -> None:
    text = section(card_of_folder(measured, "x"), MEASURED)
    assert "better than: unigram; bigram, and no better than: softmax." in text
    better = results(**results_of_lgt(measured))
    better["evaluation"]["rows"][3]["bits_per_byte"] = [2.0, 2.0]
    text = section(model_card(better, "x"), MEASURED)
    assert "better than: unigram; bigram; softmax." in text and "no better" not in text


def test_metadata_is_of_the_model_that_was_saved(measured: Path, hub: LoopbackHub) -> None:
    card = card_of_folder(measured, "me/lgt")
    (result,) = card.data.eval_results
    assert result.metric_value == 2.625 and result.metric_type == "bits_per_byte"
    assert card.data.library_name == "gravity_hf" and card.data.pipeline_tag == "text-generation"
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()
    upload(card, hub)
    assert hub.count("validate-yaml") == 1


def test_the_recipe_is_the_one_that_was_recorded(measured: Path) -> None:
    made = section(card_of_folder(measured, "x"), "How it was made")
    assert "300 steps of 8 windows of 24 tokens, 57,600 tokens in all." in made
    assert "learning rate 0.001 after 30 steps" in made and "best of 0.0005, 0.001" in made


@pytest.mark.parametrize(
    ("changes", "formula"),
    [
        ({}, "max(s (1 + 0.15 cos sqrt(s + 1e-06)), 1e-06) + 0.2\n"),
        ({"softening": 0.0}, "max(s (1 + 0.15 cos sqrt(s + 1e-06)), 1e-06)\n"),
        ({"curvature": 0.0}, "D(i, j) = s + 1e-06 + 0.2\n"),
        ({"curvature": -0.5}, "(1 - 0.5 cos"),
        ({}, "min(|G| m_i m_j / D(i, j), 50)"),
        ({"force_cap": "tanh"}, "50 tanh(|G| m_i m_j / D(i, j) / 50)"),
        ({"max_force": None}, "force(i, j) = |G| m_i m_j / D(i, j)\n"),
        ({"force_law": "power"}, "weight(i, j) ~ (m_j / D(i, j))^|G|"),
        ({"exclude_self": True}, "over j, j not i"),
        ({"position_scale": 0.5}, "|0.5 p_i - 0.5 p_j|^2"),
    ],
)
def test_the_law_is_the_one_of_the_config(changes: dict[str, Any], formula: str) -> None:
    assert formula in law_text(LGTConfig(**changes)) + "\n"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dim_position": 64}, "lets a token see others"),
        ({"dim_position": 8}, "is added to every distance"),
        ({"dim_position": 64, "exclude_self": True}, "is added to every distance"),
    ],
)
def test_the_softening_does_what_is_said(changes: dict[str, Any], said: str) -> None:
    assert said in constants(LGTConfig(**changes))


def test_only_a_recorded_training_tells_where_the_weights_are_from(
    saved: Path, measured: Path
) -> None:
    assert "not converted" not in card_of_folder(saved, "x").text
    assert "not converted" in card_of_folder(measured, "x").text


def test_limits_hold_for_the_law_that_the_model_has() -> None:
    usual = limits_of()
    assert "acts as a temperature" in usual and "passes on are its own" in usual
    assert "more than 24 tokens" in usual and "exponential of the force" in usual
    assert "identity" not in usual and "both directions" not in usual
    assert "identity" in limits_of(softening=0.0, dim_position=64)
    assert "both directions" in limits_of(is_causal=False)
    power = limits_of(force_law="power", value_projection=True)
    assert "exponential" not in power and "temperature" not in power
    assert "values are a projection" in power


def test_how_to_load_it_works(measured: Path) -> None:
    """The code of the card, run as it stands there."""
    card = card_of_folder(measured, str(measured))
    code = re.search(r"```python\n(.*?)```", section(card, "How to load it"), re.DOTALL)[1]
    names: dict[str, Any] = {}
    exec(code, names)
    assert type(names["model"]).__name__ == "LGTForCausalLM"


def test_transformers_alone_has_no_such_model() -> None:
    assert "lgt" not in CONFIG_MAPPING_NAMES


def test_a_card_can_be_made_of_its_results_alone(measured: Path, tmp_path: Path) -> None:
    file = tmp_path / "lgt.results.json"
    file.write_text(json.dumps(results_of_lgt(measured)))
    write_card(file, tmp_path / "lgt.md", name="x")
    assert (tmp_path / "lgt.md").read_text() == str(card_of_folder(measured, "x"))
    with pytest.raises(ValueError, match="with its config, got none"):
        model_card(RESULTS, "x")
