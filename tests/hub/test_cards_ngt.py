"""A card of NGT says what its config, its tensors and its results say, and nothing else."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from hub.card_results import section, table
from hub.ngt_results import RECORD, RESULTS, config, results, saved_ngt
from safetensors.torch import load_file, save_file
from torch.nn.functional import softplus
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from gravity_hf.hub.card_ngt import results_of_ngt
from gravity_hf.hub.card_ngt_law import constants, law_text
from gravity_hf.hub.cards import card_of_folder, model_card, write_card

MEASURED = "What was measured"
TWIN = {"attention": "dot_product", "positions": "alibi"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_ngt(tmp_path_factory.mktemp("ngt") / "plain", cutoff="hard")


@pytest.fixture
def measured(saved: Path, tmp_path: Path) -> Path:
    folder = Path(shutil.copytree(saved, tmp_path / "measured"))
    (folder / "results.json").write_text(json.dumps(RESULTS))
    return folder


def limits_of(preset: str = "v2", **changes: Any) -> str:
    own = json.loads(config(preset, **changes).to_json_string(use_diff=False))
    own["architectures"] = ["NGTForCausalLM"]
    return section(model_card(results(config=own), "x"), "What it cannot do")


def test_parameters_and_constants_come_from_the_tensors(saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "learned"))
    tensors = load_file(folder / "model.safetensors")
    strength = tensors["model.layers.1.attn.gravity.gamma"]
    strength[0] = 5.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model = AutoModelForCausalLM.from_pretrained(folder)
    card = card_of_folder(folder, "me/learned")
    cells = dict(table(section(card, "What it is")))
    assert cells["parameters"] == f"{model.num_parameters():,}"
    assert cells["coordinates, in a head"] == f"6, {model.config.head_coord_dim}"
    header, first, second = table(section(card, "The law"))
    assert header[2:] == ["strength g", "softening e", "mass exponent mu", "fading l", "radius r"]
    low, high = softplus(strength).sort().values.tolist()
    assert second[2] == f"{low:.4g} / {(low + high) / 2:.4g} / {high:.4g}"
    radius = softplus(tensors["model.layers.0.attn.gravity.radius"]).item()
    assert first[3] == f"{model.config.softening:.4g}" and first[6] == f"{radius:.4g}"


def test_nothing_measured_nothing_claimed(saved: Path) -> None:
    card = card_of_folder(saved, "me/plain")
    assert card.data.eval_results is None and card.data.model_name is None
    for title in (MEASURED, "How it was made", "What it cannot do"):
        assert not re.search(r"\d\.\d", section(card, title))
    assert "Nothing was measured" in card.text and "How it was made is not recorded" in card.text
    assert "quality was not measured" in card.text and "None" not in str(card)


def test_what_was_measured_is_that_of_the_results(measured: Path) -> None:
    card = card_of_folder(measured, "me/ngt")
    text = section(card, MEASURED)
    rows = {row[0]: row[1:] for row in table(text)}
    assert rows["vanilla"] == ["12,345", "2.3125 ± 0.0884", "2"]
    assert rows["**NGT: this model**"] == ["6,789", "2.6875 ± 0.0884", "2"]
    assert "it is no better than: vanilla." in text and "nigram" not in text
    assert "GPT-2" not in text
    (result,) = card.data.eval_results
    assert result.metric_value == 2.625 and result.metric_type == "bits_per_byte"
    made = section(card, "How it was made")
    assert "300 steps of 8 windows of 24 tokens, 57,600 tokens in all, in bfloat16" in made
    assert "learning rate 0.001 after 30 steps" in made and "dropout 0.1" in made


@pytest.mark.parametrize(
    ("preset", "changes", "formula"),
    [
        ("v2", {}, "~ m_j^mu exp(-l (i - j)) / (d2(i, j) + e)^g, normalised over j < i\n"),
        ("v2", {"mass_exponent": False, "mass_fading": 0}, "~ m_j / (d2(i, j) + e)^g"),
        ("v2", {"token_masses": False, "mass_fading": 0}, "~ 1 / (d2(i, j) + e)^g"),
        ("v2", {"exclude_self": False}, "over j <= i\n"),
        ("v2", {"cutoff": "hard"}, "over j < i, d2 <= r^2"),
        ("v2", {"cutoff": "log"}, "^g) + ln sigmoid((r^2 - d2) / 1) over"),
        ("v2", {"anchor_coordinates": False}, "c = Wc z + Wu LN(h) + b    (keys have"),
        (
            "v2",
            {},
            "(keys have maps of their own, which began as copies; in the last head, those of "
            "queries)\n",
        ),
        ("v2", {"shared_start": False, "symmetric_heads": 0}, "(keys have maps of their own)\n"),
        ("reference", {}, "softmax of (-g / (d2(i, j) + e) + beta) m_i m_j over j <= i, d2 <="),
        ("reference", {"cutoff": "soft"}, "m_i m_j times max(1 - d2 / r^2, 0) over"),
        (
            "fixed",
            {"repulsive": False, "mass_in_value": True},
            "softmax of g / (d2(i, j) + e) over",
        ),
        ("v2", TWIN, "softmax of q_i.k_j / sqrt(d) - slope_h (i - j) over j <= i\n"),
    ],
)
def test_the_law_is_the_one_of_the_config(preset: str, changes: dict, formula: str) -> None:
    assert formula in law_text(config(preset, **changes)) + "\n"


def test_letters_are_explained_where_they_stand() -> None:
    text = constants(config(cutoff="log"))
    assert "r: the radius" in text and "l: how fast" in text and "m: mass" in text
    plain = constants(config(token_masses=False, mass_fading=0))
    assert not re.search(r"\b[rlm]: ", plain)
    assert "fixed, 1e-06" in constants(config("reference"))


def test_limits_hold_for_the_law_that_the_model_has() -> None:
    usual = limits_of()
    assert "gives itself no weight" in usual and "beyond 24 tokens" in usual
    assert "symmetric" not in usual and "exponential" not in usual and "repels" not in usual
    published = limits_of("reference")
    for said in ("never enters its coordinates", "repels", "exponential", "symmetric", "last 24"):
        assert said in published
    assert "are refused" in limits_of("fixed") and "hides nothing" in limits_of(
        "reference", cutoff="soft"
    )
    twin = limits_of(attention="dot_product", positions="none")
    assert "has no positions" in twin and "weight" not in twin and "Distances" not in twin


def test_a_twin_is_not_called_gravity(tmp_path: Path) -> None:
    card = card_of_folder(saved_ngt(tmp_path / "twin", **TWIN), "me/twin")
    assert card.data.tags == ["ngt"]
    assert "has no gravity" in card.text and "Tokens are particles" not in card.text


def test_without_results_the_record_of_the_training_says_how_it_was_made(
    saved: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "trained"))
    (folder / "pretrain.json").write_text(json.dumps(RECORD))
    card = card_of_folder(folder, "me/trained")
    made, known = section(card, "How it was made"), section(card, MEASURED)
    assert "40 steps of 6 windows of 24 tokens, 5,760 tokens in all, in bfloat16" in made
    assert "0.003 after 4 steps of warmup, then a cosine to 0.1 of it" in made
    assert "best of" not in made and "repelled each other in training, weight 0.05" in made
    assert "2.5000 nats per token, about 1.8034 bits per byte" in known
    assert "python pretrain.py --output_dir out" in known and "/home" not in str(card)
    assert "Beside that loss its quality was not measured" in section(card, "What it cannot do")
    (folder / "pretrain.json").write_text(
        json.dumps({**RECORD, "arguments": {"architecture": "gpt2", "length": 24}})
    )
    assert "is not recorded" in section(card_of_folder(folder, "x"), "How it was made")


def test_how_to_load_it_works(measured: Path) -> None:
    """The code of the card, run as it stands there."""
    card = card_of_folder(measured, str(measured))
    code = re.search(r"```python\n(.*?)```", section(card, "How to load it"), re.DOTALL)[1]
    names: dict[str, Any] = {}
    exec(code, names)
    assert type(names["model"]).__name__ == "NGTForCausalLM"


def test_transformers_alone_has_no_such_model() -> None:
    assert "ngt" not in CONFIG_MAPPING_NAMES


def test_a_card_can_be_made_of_its_results_alone(measured: Path, tmp_path: Path) -> None:
    file = tmp_path / "ngt.results.json"
    file.write_text(json.dumps(results_of_ngt(measured)))
    write_card(file, tmp_path / "ngt.md", name="x")
    assert (tmp_path / "ngt.md").read_text() == str(card_of_folder(measured, "x"))
    with pytest.raises(ValueError, match="results of an NGT with its config, got none"):
        model_card(RESULTS, "x")
