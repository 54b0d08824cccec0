"""Model cards say what was measured, how gravitational it is, and nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hub.card_results import ATTENTION, OLD_RESULTS, RESULTS, ROWS, results, section, table
from huggingface_hub import ModelCard

from gravity_hf.hub.cards import model_card, write_card

MEASURED = "What was measured"


def test_every_quality_stands_beside_softness_and_contrast() -> None:
    header, *body = table(section(model_card(results(), "out"), MEASURED))
    assert header[-3:] == ["softness", "contrast", "KL"]
    cells = {row[0]: row[1:] for row in body}
    assert cells["the host"] == ["2.5000", "–", "–", "–", "–", "–"]
    assert cells["calibrated"] == ["2.7500", "+0.2500", "–", "0.987", "1.86", "0.0123"]
    assert cells["after LoRA"] == ["2.4125", "-0.0875", "+0.0125", "0.987", "1.86", "0.0123"]


def test_a_cell_that_was_not_measured_says_so() -> None:
    changed = results()
    del changed["evaluation"]["rows"][2]["attention"], changed["evaluation"]["rows"][3]["loss"]
    _, *body = table(section(model_card(changed, "out"), MEASURED))
    cells = {row[0]: row[1:] for row in body}
    assert cells["calibrated"] == ["2.7500", "+0.2500", *["not measured"] * 3]
    assert cells["after LoRA"][:2] == ["not measured", "not measured"]


def test_numbers_follow_the_results() -> None:
    changed = results()
    changed["evaluation"]["rows"][3]["loss"] = 2.6543
    assert "2.6543" in model_card(changed, "out").text
    assert "2.6543" not in model_card(results(), "out").text


def test_the_law_stands_with_the_constants_of_every_layer() -> None:
    text = section(model_card(results(), "out"), "The law")
    header, *rows = table(text)
    assert header == ["layer", "masses", "mass M", "softening eps", "key radius R"]
    assert rows[0] == ["`a`", "6", "7 / 7.5 / 7.75", "2.625 / 3.125 / 3.375", "4.875"]
    assert "M^2 / ((|q_i|^2 + R^2 - 2 q_i.k_j) + eps)" in text


def test_what_was_changed_is_counted() -> None:
    cells = dict(table(section(model_card(results(), "out"), "What was changed")))
    assert cells["host"] == "`maker/host`"
    assert cells["attention modules converted"] == "2 of 2"
    assert cells["parameters of the host"] == "1,234,567"
    assert cells["added"] == "12 masses; 12 softenings; 2 key radii, fixed"
    assert cells["masses M, lowest and highest"] == "7 and 9"
    assert "median contrast 1.86" in cells["how gravitational"]


def test_nothing_is_claimed_for_what_was_left_out() -> None:
    bare = results(
        evaluation=None,
        calibration=None,
        layers=None,
        gravity=None,
        training={"transfer": None, "lora": None, "control": None},
        left_out=["calibrate", "control", "evaluate", "lora", "merge", "transfer"],
    )
    card = model_card(bare, "out")
    assert table(section(card, MEASURED)) == []
    text = card.text
    assert "Nothing was measured" in text and "Its quality was not measured" in text
    assert "LoRA on the attention" not in text and "Attention transfer" not in text
    assert "Not calibrated" in text and "constants of each layer: not measured." in text
    assert card.data.eval_results is None and card.data.model_name is None
    # No decimal number but the constants and versions.
    assert set(re.findall(r"\d+\.\d+", text)) <= {"0.1", "0.1.0", "2.13", "13.0", "2.0"}


def test_results_of_an_earlier_version_still_have_a_card() -> None:
    text = model_card(OLD_RESULTS, "out").text
    assert "R^2" in text and "2.4125" in text
    assert "constants of each layer: not measured." in text
    assert "no card of the host was found" in text


def test_annealing_is_part_of_the_recipe() -> None:
    assert "Softness lowered" not in model_card(results(), "out").text
    annealed = results(settings={**RESULTS["settings"], "anneal_to": 0.25})
    assert "Softness lowered towards 0.25" in model_card(annealed, "out").text


def test_the_recipe_names_its_control_or_that_there_was_none() -> None:
    made = "How it was made"
    assert "Control: the host with its own attention" in section(model_card(results(), "out"), made)
    alone = results(training={**RESULTS["training"], "control": None})
    alone["evaluation"]["rows"] = [row for row in ROWS if row["key"] != "control"]
    card = model_card(alone, "out")
    assert "same LoRA, for comparison: not measured" in section(card, made)
    assert "control" not in section(card, MEASURED)


def test_it_says_how_to_load_it() -> None:
    text = section(model_card(results(), "me/out"), "How to load it")
    assert 'load_gravity_model("me/out")' in text
    assert 'AutoModelForCausalLM.from_pretrained("me/out", trust_remote_code=True)' in text
    adapter = section(model_card(results(saved="adapter"), "me/out"), "How to load it")
    assert "trust_remote_code" not in adapter and "drop its masses" in adapter


@pytest.mark.parametrize(
    ("host", "auto"),
    [
        ("BertForMaskedLM", "AutoModelForMaskedLM"),
        ("BertModel", "AutoModel"),
        ("GPT2LMHeadModel", "AutoModelForCausalLM"),
    ],
)
def test_the_auto_class_is_the_one_of_the_host(host: str, auto: str) -> None:
    changed = results(host={**RESULTS["host"], "class": host})
    assert f"import {auto}\n" in model_card(changed, "out").text


def test_it_is_written_from_the_file_whole(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    write_card(tmp_path / "results.json", tmp_path / "README.md")
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "README.md"}
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers"
    assert f"# {tmp_path.name}\n" in card.text
    assert "Gravity is a word | <b>" in card.text


def test_what_a_model_writes_cannot_end_its_own_block() -> None:
    changed = results()
    changed["evaluation"]["samples"] = [{"prompt": "a", "text": "\n~~~~\n# Not a heading\n~~~~~"}]
    assert "~~~~~~text\na\n~~~~\n# Not a heading\n~~~~~\n~~~~~~" in model_card(changed, "out").text


def test_an_encoder_is_described_by_its_embeddings() -> None:
    likeness = {"cosine_mean": 0.99, "cosine_min": 0.9, "spearman": 0.98, "same_neighbour": 0.75}
    changed = results()
    changed["evaluation"] |= {
        "measure": "embeddings",
        "rows": [{"key": "calibrated", "title": "calibrated", **likeness, "attention": ATTENTION}],
    }
    header, row = table(section(model_card(changed, "out"), MEASURED))
    assert header[1:5] == ["mean cosine to the host's", "lowest", "Spearman", "same neighbour"]
    assert row[1:5] == ["0.9900", "0.9000", "0.9800", "0.75"]
