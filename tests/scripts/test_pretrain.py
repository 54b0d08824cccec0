"""scripts/pretrain.py as it is typed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import gravity_hf  # noqa: F401  makes AutoModel know gravity types

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "pretrain.py"
RECIPE = """
architecture: gpt2
overrides: n_embd=16,n_layer=1,n_head=2,n_positions=16
tokenizer: char
length: 16
validation_windows: 4
max_steps: 4
warmup_steps: 1
per_device_train_batch_size: 2
eval_steps: 2
save_steps: 2
logging_steps: 1
use_cpu: true
"""


def pretrain(*arguments):
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def test_a_recipe_trains_saves_and_records(tmp_path):
    text, recipe, out = tmp_path / "text.txt", tmp_path / "recipe.yaml", tmp_path / "out"
    text.write_text("Gravity is what holds it together. " * 60)
    recipe.write_text(RECIPE)
    done = pretrain(recipe, "--text_files", text, "--output_dir", out, "--law", "force")
    assert done.returncode == 0, done.stderr
    record = json.loads((out / "pretrain.json").read_text())
    assert f"validation loss {record['loss']:.4f}" in done.stdout
    assert record["arguments"]["law"] == "force" and set(record["evaluations"]) == {"2", "4"}
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.model_type == "gravity_gpt2"
    assert len(AutoTokenizer.from_pretrained(out)) == model.config.vocab_size
