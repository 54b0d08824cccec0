"""A card of a LeanFormer says what its config, its tensors and its results say, nothing else."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hub.card_results import section, table
from hub.ngt_results import RECORD, RESULTS
from safetensors.torch import load_file, save_file
from torch.nn.functional import softplus
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from gravity_hf import LeanFormerConfig, LeanFormerForCausalLM
from gravity_hf.cli.main import app
from gravity_hf.hub.cards import card_of_folder
from gravity_hf.hub.checks import check_export

SIZES: dict[str, Any] = {
    **{"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "intermediate_size": 32, "max_position_embeddings": 24},
    **{"attention_rank": 4, "feed_forward_rank": 0, "screen_dim": 4, "gate_rank": 4},
    **{"attention_top_k": 8, "local_window": 4, "sink_tokens": 1, "feed_forward_block": 8},
}


def saved(folder: Path, **changes: Any) -> Path:
    torch.manual_seed(0)
    LeanFormerForCausalLM(LeanFormerConfig(**{**SIZES, **changes})).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("law", ["power", "force"])
def test_sizes_and_constants_come_from_the_files(tmp_path: Path, law: str) -> None:
    folder = saved(tmp_path / "lean", attention="gravity", gravity_law=law)
    tensors = load_file(folder / "model.safetensors")
    gamma = tensors["model.layers.1.self_attn.gravity.gamma"]
    gamma[0] = 5.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    check_export(folder)
    card = card_of_folder(folder, "me/lean")
    cells = dict(table(section(card, "What it is")))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert cells["parameters"] == f"{model.num_parameters():,}"
    assert (cells["query heads, KV heads"], cells["rank of attention's maps"]) == ("2, 1", "4")
    assert cells["rank of the network's maps"] == "dense"
    text = section(card, "The law")
    assert ("~ 1 / (d2(i, j) + e)^g" in text) == (law == "power")
    assert ("softmax of g / (d2(i, j) + e)" in text) == (law == "force")
    header, first, second = table(text)
    assert header == ["layer", "heads", "strength g", "softening e"]
    low, high = softplus(gamma).sort().values.tolist()
    assert second[2] == f"{low:.4g} / {(low + high) / 2:.4g} / {high:.4g}"
    assert first[3] == f"{model.config.softening_start:.4g}"
    assert card.data.tags == ["gravity-attention", "leanformer"]
    shown = CliRunner().invoke(app, ["status", str(folder)])
    assert shown.exit_code == 0 and "strength g" in shown.output and first[3] in shown.output


def test_dot_products_are_not_called_gravity(tmp_path: Path) -> None:
    folder = saved(tmp_path / "lean", feed_forward_policy="block", exit_threshold=0.5)
    check_export(folder)
    card = card_of_folder(folder, "me/lean")
    assert card.data.tags == ["leanformer"] and "There is no gravity in it." in card.text
    limits = section(card, "What it cannot do")
    assert "nothing is saved" not in limits and "leaves early" not in limits
    assert "What its screening does not choose is not read" in limits


def test_nothing_measured_nothing_claimed(tmp_path: Path) -> None:
    folder = saved(tmp_path / "lean", screening="none")
    card = card_of_folder(folder, "me/lean")
    assert card.data.eval_results is None
    assert "Nothing was measured" in card.text and "None" not in str(card)
    limits = section(card, "What it cannot do")
    for said in ("nothing is saved", "No token leaves early", "quality was not measured"):
        assert said in limits
    assert "screening" not in limits and not re.search(r"\d\.\d", limits)


def test_results_and_records_say_how_it_was_made(tmp_path: Path) -> None:
    folder = saved(tmp_path / "lean")
    record = {**RECORD, "arguments": {"architecture": "leanformer", "length": 24}}
    (folder / "pretrain.json").write_text(json.dumps(record))
    made = section(card_of_folder(folder, "me/lean"), "How it was made")
    assert "40 steps of 6 windows of 24 tokens, 5,760 tokens in all, in bfloat16" in made
    results = {**RESULTS, "model_type": "leanformer"}
    (folder / "results.json").write_text(json.dumps(results))
    card = card_of_folder(folder, "me/lean")
    assert "300 steps of 8 windows" in section(card, "How it was made")
    assert card.data.eval_results[0].metric_value == 2.625
