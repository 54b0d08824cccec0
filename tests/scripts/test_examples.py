"""The examples run, in their shortest form, and print what they promise."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "scripts" / "examples"
SHORTEST = {
    "lgt_basic_inference": ["--length", "8"],
    "lgt_edge_export": ["--format", "fp16", "--vocab-size", "50", "--seconds", "0"],
    "lgt_language_model": ["--steps", "5", "--batch", "4", "--length", "32"],
    "trimodel_fusion": ["--steps", "5"],
    "victoros_integration": ["--steps", "5"],
}


@pytest.fixture
def example(capsys):
    """Runs an example in this process; what it printed."""

    def run(name, *more):
        spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        capsys.readouterr()
        module.main([*SHORTEST[name], *more])
        return capsys.readouterr().out

    return run


def test_every_example_is_run_here():
    assert {file.stem for file in EXAMPLES.glob("*.py")} == set(SHORTEST)


def test_basic_inference_mixes_tokens_is_causal_and_comes_back_from_disk(example):
    said = example("lgt_basic_inference")
    own = float(re.search(r"weight of a token on itself: ([\d.]+)", said)[1])
    assert 0 < own < 0.9
    assert "logits before it move by 0.0e+00" in said and "the same logits: True" in said


def test_the_language_model_is_held_to_counting(example):
    said = example("lgt_language_model")
    numbers = re.search(r"unigram ([\d.]+), bigram ([\d.]+), uniform ([\d.]+)", said)
    unigram, bigram, uniform = map(float, numbers.groups())
    assert bigram < unigram < uniform
    found = float(re.search(r"parameters\) ([\d.]+)", said)[1])
    # Five steps teach it something, and not what counting knows: it says so.
    assert unigram < found < uniform and "it beats: neither" in said


def test_the_runtime_logs_grows_and_notices_an_edit(example, tmp_path):
    file = tmp_path / "ledger.jsonl"
    said = example("victoros_integration", "--ledger", str(file))
    assert "outputs moved by 0.0e+00" in said and "echo" in said
    healthy, edited = (line for line in said.splitlines() if "ledger.jsonl:" in line)
    assert "the chain holds" in healthy and "the chain holds" not in edited
    events = file.read_text(encoding="utf-8")
    assert events.count('"inference"') == 5 and "architecture_change" in events


def test_the_edge_export_shows_claims_sizes_and_times(example, tmp_path):
    said = example("lgt_edge_export", "--out", str(tmp_path / "edge"))
    assert "~150 K" in said and "fp16, loaded with AutoModelForCausalLM" in said
    assert {path.name for path in (tmp_path / "edge").iterdir()} == {"edge.json", "fp16", "fp32"}


def test_the_tri_model_fuses_streams_of_different_lengths(example):
    said = example("trimodel_fusion")
    assert "fused (256, 6, 8)" in said and "world_snapshot" in said
