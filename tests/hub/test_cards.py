"""Model cards say what was measured, how gravitational it is, and nothing else."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from gravity_hf.hub.cards import model_card, write_card

ATTENTION = {
    "softness": 1.0,
    "softness_median": 0.987,
    "contrast_min": 1.11,
    "contrast_median": 1.86,
    "contrast_max": 3.21,
    "kl_mean": 0.0123,
    "heads": 12,
    "distance": "lifted",
    "law": "force",
}
ROWS = [
    {"key": "host", "title": "the host", "loss": 2.5},
    {"key": "control", "title": "the control", "loss": 2.4},
    {"key": "calibrated", "title": "calibrated", "loss": 2.75, "attention": ATTENTION},
    {"key": "healed", "title": "after LoRA", "loss": 2.4125, "attention": ATTENTION},
]
RESULTS: dict[str, Any] = {
    "format": 1,
    "host": {
        "name": "maker/host",
        "class": "Qwen2ForCausalLM",
        "parameters": 1234567,
        "dtype": "float32",
        "writes": True,
    },
    "saved": "model",
    "law": "force",
    "settings": {
        **{"seed": 3, "length": 256, "samples": 16, "mass_per": "query_head", "fit": False},
        **{"transfer_steps": 0, "transfer_learning_rate": 1e-3, "lora_steps": 300, "lora_rank": 8},
        **{"lora_alpha": 16, "lora_learning_rate": 2e-4, "batch_size": 4, "accumulation": 2},
        "anneal_to": None,
    },
    "left_out": ["transfer"],
    "patch": {"layers": ["a", "b"], "skipped": []},
    "calibration": ATTENTION,
    "training": {"transfer": None, "lora": {"objective": None}, "control": {}},
    "evaluation": {
        "measure": "loss",
        "text": "two files",
        "tokens": 4096,
        "length": 256,
        "stride": None,
        "attention_batches": 4,
        "rows": ROWS,
        "samples": [{"prompt": "Gravity is", "text": " a word | <b>"}],
    },
    "conditions": {
        "command": "gravity-hf convert maker/host out --lora-steps 300",
        "date": "2026-01-02",
        "device": "a processor",
        "versions": {"torch": "2.13.0"},
        "processes": 1,
    },
}


def results(**changes: Any) -> dict[str, Any]:
    return {**copy.deepcopy(RESULTS), **changes}


def table(card: ModelCard) -> list[list[str]]:
    lines = [line for line in card.text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_quality_stands_beside_softness_and_contrast() -> None:
    header, _, *body = table(model_card(results(), "out"))
    assert header[-3:] == ["softness", "contrast", "KL"]
    cells = {row[0]: row[1:] for row in body}
    assert cells["the host"] == ["2.5000", "–", "–", "–", "–", "–"]
    assert cells["calibrated"] == ["2.7500", "+0.2500", "–", "0.987", "1.86", "0.0123"]
    assert cells["after LoRA"] == ["2.4125", "-0.0875", "+0.0125", "0.987", "1.86", "0.0123"]


def test_numbers_follow_the_results() -> None:
    changed = results()
    changed["evaluation"]["rows"][3]["loss"] = 2.6543
    assert "2.6543" in model_card(changed, "out").text
    assert "2.6543" not in model_card(results(), "out").text


def test_nothing_is_claimed_for_what_was_left_out() -> None:
    bare = results(
        evaluation=None,
        calibration=None,
        training={"transfer": None, "lora": None, "control": None},
        left_out=["calibrate", "control", "evaluate", "lora", "merge", "transfer"],
    )
    card = model_card(bare, "out")
    assert table(card) == []
    text = card.text
    assert "Nothing was measured" in text and "Its quality was not measured" in text
    assert "LoRA on the attention" not in text and "Attention transfer" not in text
    assert "Not calibrated" in text and "not measured." in text
    # No decimal number but the constants and versions.
    assert set(re.findall(r"\d+\.\d+", text)) <= {"0.1", "0.1.0", "2.13", "13.0"}


def test_annealing_is_part_of_the_recipe() -> None:
    assert "Softness lowered" not in model_card(results(), "out").text
    annealed = results(settings={**RESULTS["settings"], "anneal_to": 0.25})
    assert "Softness lowered towards 0.25" in model_card(annealed, "out").text


def test_without_a_control_nothing_is_compared_with_one() -> None:
    alone = results()
    alone["evaluation"]["rows"] = [row for row in ROWS if row["key"] != "control"]
    text = model_card(alone, "out").text
    assert "control" not in text


def test_it_says_how_to_load_it_and_what_cannot_run_it() -> None:
    text = model_card(results(), "out").text
    assert 'load_gravity_model("out")' in text
    assert 'AutoModelForCausalLM.from_pretrained("out", trust_remote_code=True)' in text
    assert "llama.cpp" in text and "softmax; it is not literal gravity" in text
    adapter = model_card(results(saved="adapter"), "out")
    assert "trust_remote_code" not in adapter.text and "drop its masses" in adapter.text
    assert adapter.data.library_name == "peft"
    assert "literal gravity" not in model_card(results(law="power"), "out").text


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


def test_metadata_names_the_host_on_the_hub_and_no_folder(tmp_path: Path) -> None:
    data = model_card(results(), "out").data
    assert data.base_model == "maker/host" and data.pipeline_tag == "text-generation"
    assert data.tags == ["gravity-attention", "gravity-force"]
    local = results(host={**RESULTS["host"], "name": str(tmp_path), "writes": False})
    assert model_card(local, "out").data.base_model is None
    assert model_card(local, "out").data.pipeline_tag is None


def test_it_is_written_from_the_file_whole(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(json.dumps(RESULTS))
    write_card(tmp_path / "results.json", tmp_path / "README.md")
    assert {file.name for file in tmp_path.iterdir()} == {"results.json", "README.md"}
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers"
    assert f"# {tmp_path.name}\n" in card.text
    assert "Gravity is a word | <b>" in card.text


def test_an_encoder_is_described_by_its_embeddings() -> None:
    likeness = {"cosine_mean": 0.99, "cosine_min": 0.9, "spearman": 0.98, "same_neighbour": 0.75}
    changed = results()
    changed["evaluation"] |= {
        "measure": "embeddings",
        "rows": [{"key": "calibrated", "title": "calibrated", **likeness, "attention": ATTENTION}],
    }
    header, _, row = table(model_card(changed, "out"))
    assert header[1:5] == ["mean cosine to the host's", "lowest", "Spearman", "same neighbour"]
    assert row[1:5] == ["0.9900", "0.9000", "0.9800", "0.75"]
